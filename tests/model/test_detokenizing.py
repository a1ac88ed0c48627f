"""Text that is decoded token by token is the text of all tokens, and each token costs the decoding of a few."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from m3model.engine.detokenizing import Detokenizer
from tests.model.families import TEXT, make_tokenizer


def decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decode


def check(tokenizer: Any, tokens: Sequence[int]) -> int:
    """Compare with decoding all at once, after every token. Returns the most tokens that were decoded together."""
    decode, most = decoder(tokenizer), 0

    def counted(some: Sequence[int]) -> str:
        nonlocal most
        most = max(most, len(some))
        return decode(some)

    detokenizer = Detokenizer(counted)
    for end, token in enumerate(tokens, start=1):
        assert detokenizer.add(token) == decode(tokens[:end])
    return most


@cache
def smollm2(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path)


characters = st.text(st.sampled_from("né65€ 😀🏳️‍🌈語の\u0301\n\ufffd"), max_size=30)


@given(tokens=st.lists(st.integers(0, 319), max_size=80))
@example(tokens=[*range(4, 44)])  # bytes that are no UTF-8
def test_any_tokens_of_a_byte_level_tokenizer(tokens: list[int]) -> None:
    check(make_tokenizer(), tokens)


@given(text=characters, cut=st.integers(0, 3), special=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3))))
def test_half_characters_with_special_tokens_between(text: str, cut: int, special: list[tuple[int, int]]) -> None:
    tokenizer = make_tokenizer()
    tokens = tokenizer(text * 3)["input_ids"]
    tokens = tokens[: len(tokens) - cut]
    for place, token in special:
        tokens.insert(place, token)
    check(tokenizer, tokens)


def test_few_tokens_are_decoded_together() -> None:
    tokenizer = make_tokenizer()
    for text in (TEXT, "😀" * 100, "né65€" * 40):
        assert check(tokenizer, tokenizer(text)["input_ids"]) < 24
    # No character at all: every byte is its own.
    assert check(tokenizer, tokenizer.convert_tokens_to_ids(["Ģ"] * 200)) < 24
    # And where nothing but special tokens comes, what follows is followed again.
    assert check(tokenizer, [*[0] * 50, *tokenizer(TEXT)["input_ids"]]) < 50 + 24


def test_a_tokenizer_with_spaces_before_words_and_bytes_for_what_it_lacks() -> None:
    """As Llama 2's: the space of the first word is no text, and a character that it lacks is a token for each byte."""
    words = ["▁the", "▁lamp", "s", "▁", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    euro = [words.index(f"<0x{byte:02X}>") for byte in "€".encode()]
    tokens = [0, 1, 2, *euro, *euro, 0, 3, 3, 0, 1, *euro, 4] * 6
    assert check(fast, tokens) < 24


@pytest.mark.real_model
def test_any_tokens_of_smollm2(smollm2_path: Path) -> None:
    tokenizer = smollm2(smollm2_path)
    special = tokenizer.all_special_ids
    bytes_ = [token for token in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([token])]
    assert len(bytes_) > 100
    anything = st.integers(0, len(tokenizer) - 1) | st.sampled_from(bytes_) | st.sampled_from(special)

    @given(tokens=st.lists(anything, max_size=80))
    def any_tokens(tokens: list[int]) -> None:
        check(tokenizer, tokens)

    @given(text=characters)
    def any_text(text: str) -> None:
        assert check(tokenizer, tokenizer(text * 4)["input_ids"]) < 24

    any_tokens()
    any_text()
