"""Texts in pieces of equally many tokens."""

from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from m3model.engine.cutting import cut
from m3runtime.errors import InputError
from tests.model.families import TEXT, make_adapter, make_tokenizer, random_text

WORDS = st.lists(st.sampled_from([*TEXT.split(), "a,", "b\n\n", "  ", "x1"]), max_size=40).map(" ".join)
TEXTS = WORDS | st.text(max_size=60) | st.text(st.sampled_from("aé東😀 \n"), max_size=60)


class WithoutSpans(PreTrainedTokenizerFast):  # type: ignore[misc, no-any-unimported, unused-ignore]
    """As slow tokenizers are: it does not tell which characters a token has."""

    @property
    def is_fast(self) -> bool:
        return False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        assert not options.get("return_offsets_mapping")
        return super().__call__(*arguments, **options)


FAST = make_tokenizer()
SLOW = WithoutSpans(tokenizer_object=FAST.backend_tokenizer)
TRIMMING = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(FAST.backend_tokenizer.to_str()))
"""Leaves the space that a token begins with out of the token's span, as those of RoBERTa's kin do."""
TRIMMING.backend_tokenizer.post_processor = ByteLevel(add_prefix_space=False, trim_offsets=True)


def count(text: str) -> int:
    return len(FAST(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("tokenizer", [FAST, TRIMMING, SLOW], ids=["fast", "trimming", "slow"])
@given(text=TEXTS, tokens=st.integers(1, 12))
def test_pieces_join_to_the_text_and_have_its_tokens(tokenizer: Any, text: str, tokens: int) -> None:
    pieces = cut(tokenizer, text, tokens)
    assert "".join(pieces) == text
    assert all(pieces)
    for piece, following in pairwise(pieces):
        assert count(piece) <= tokens or len(piece) == 1
        assert count(piece) + count(following[0]) > tokens, "one character more would have fitted"
    assert not pieces or count(pieces[-1]) <= tokens or len(pieces[-1]) == 1


@pytest.mark.parametrize("tokenizer", [FAST, TRIMMING], ids=["fast", "trimming"])
@given(seed=st.integers(0, 50), tokens=st.integers(1, 12), length=st.integers(1, 60))
def test_the_tokens_of_pieces_are_the_texts(tokenizer: Any, seed: int, tokens: int, length: int) -> None:
    text = random_text(FAST, length, seed)
    ids = FAST(text, add_special_tokens=False)["input_ids"]
    alone = [FAST(piece, add_special_tokens=False)["input_ids"] for piece in cut(tokenizer, text, tokens)]
    assert alone == [ids[start : start + tokens] for start in range(0, length, tokens)]


def test_a_character_of_more_tokens_is_a_piece() -> None:
    assert count("😀") == 4
    for tokenizer in (FAST, SLOW):
        assert cut(tokenizer, "😀😀", 3) == ["😀", "😀"]
        assert cut(tokenizer, "a😀b", 4) == ["a", "😀", "b"]


def test_nothing_gives_nothing_and_no_tokens_no_piece() -> None:
    adapter = make_adapter("llama")
    assert adapter.cut("", 4) == []
    assert adapter.cut("the harbour lamp", 100) == ["the harbour lamp"]
    with pytest.raises(InputError, match="a piece has at least 1 token, not 0"):
        adapter.cut("the lamp", 0)


@pytest.mark.real_model
def test_a_real_tokenizers_pieces_are_tokenized_alone_as_in_the_text(smollm2_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    handbook = (Path(__file__).parents[2] / "m3runtime/cli/demo/handbook.md").read_text()
    text = handbook.replace(", ", " ✓ ")
    pieces = cut(tokenizer, text, 64)
    alone = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    assert "".join(pieces) == text
    assert [*chain(*alone)] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert {len(ids) for ids in alone[:-1]} <= {62, 63, 64}, "a tick has three tokens, and is not cut"
