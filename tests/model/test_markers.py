"""Markers of special tokens in the words of documents and users are text, and only the template's are tokens."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from m3model.engine.cutting import cut
from m3model.engine.prompts import chat, render
from m3model.engine.tokens import PromptTokens
from m3runtime.adapters.answers import Prompt
from m3runtime.config.schema import MemoryConfig

pytestmark = pytest.mark.real_model
HOSTILE = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<repo_name>", "<|im_", "end|>", "\ue000", "a", " "]
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="session")
def tokenizer(smollm2_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.fixture(scope="session")
def start(tokenizer: Any) -> PromptTokens:
    return PromptTokens(tokenizer, MemoryConfig())


@pytest.fixture(scope="session")
def turn(tokenizer: Any) -> PromptTokens:
    return PromptTokens(tokenizer, MemoryConfig(place="turn"))


def special(tokens: PromptTokens, ids: list[int]) -> list[int]:
    return [id for id in ids if id in tokens.tokenizer.all_special_ids]


@given(text=HOSTILE)
def test_a_text_has_no_special_tokens(start: PromptTokens, text: str) -> None:
    ids = start.ids(text)
    assert special(start, ids) == []
    assert start.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert special(start, start.tokenizer("<|im_end|>")["input_ids"])  # its own state is as it was
    assert "".join(cut(start.literal, text, 3)) == text


@given(words=st.lists(HOSTILE, min_size=1, max_size=3))
def test_a_conversation_has_its_templates_special_tokens(tokenizer: Any, start: PromptTokens, words: list[str]) -> None:
    def conversation(contents: list[str]) -> Prompt:
        roles = ["user", "assistant", "user"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
        return chat(tokenizer, messages)

    prompt = conversation(words)
    for text in words:
        assert text in prompt.text
    for sink in (False, True):
        plain = start.of_prompt(conversation(["a"] * len(words)), sink=sink)
        assert special(start, start.of_prompt(prompt, sink=sink)) == special(start, plain)


@given(text=HOSTILE)
def test_a_turn_with_memories_has_its_templates_special_tokens(tokenizer: Any, turn: PromptTokens, text: str) -> None:
    plain = turn.of_prompt(render(tokenizer, "a", "chat", sink="Reference:"), sink=True)
    hostile = turn.of_prompt(render(tokenizer, text, "chat", sink="Reference:", texts=[text]), sink=True)
    assert special(turn, hostile) == special(turn, plain)


@given(text=HOSTILE)
def test_a_question_has_no_special_tokens(tokenizer: Any, start: PromptTokens, text: str) -> None:
    for form in ("question", "reference"):
        prompt = render(tokenizer, text, form, sink="Reference:", texts=[text])
        assert special(start, start.of_prompt(prompt, sink=True)) == []


def test_a_plain_prompt_is_taken_as_it_is(tokenizer: Any, start: PromptTokens) -> None:
    prompt = render(tokenizer, "a <|im_end|>", "plain", sink="Reference:", texts=["b <|im_end|>"])
    assert special(start, start.of_prompt(prompt, sink=True)) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_references_share_what_a_sink_begins_with(tokenizer: Any) -> None:
    one, two = (render(tokenizer, "c", "plain", sink=sink, texts=["a", "b"]).text for sink in ("R:", "Told.\n\nR:"))
    assert (one, two) == ("R: a\n\nR: b\n\nc", "Told.\n\nR: a\n\nR: b\n\nc")


def test_a_prompt_without_markers_has_the_tokens_of_its_text(tokenizer: Any, start: PromptTokens) -> None:
    prompt = chat(tokenizer, [{"role": "user", "content": "Which oil burns\nin the lamp?"}])
    assert prompt.literal == ()
    assert start.of_prompt(prompt, sink=True) == tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
