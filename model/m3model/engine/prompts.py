"""Prompts that ask a question, with memories or with references as text."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from m3model.engine.markers import Markers, shown
from m3runtime.adapters.answers import Form, Prompt
from m3runtime.errors import ConfigError

_QUESTION = "\n\nQuestion: {question}\nAnswer:"
_REFERENCE = "\n\nThe references answer a question in a few words.\nQuestion: {question}\nAnswer:"


def render(tokenizer: Any, question: str, form: Form, *, sink: str, texts: Sequence[str] | None = None) -> Prompt:
    r"""The prompt that asks ``question``.

    ``question`` completes ``Question: ...\nAnswer:``, ``reference`` does so after a line that points to the references,
    of which memories leave no word in the prompt, ``chat`` uses the model's chat template, ``plain`` takes the text as
    it is, markers of special tokens included. With ``texts`` the references stand in the prompt, the first after the
    sink's words, as it would stand in a memory, each further one after its last paragraph; that is what memory is
    compared with. Raises `ConfigError` if the model has no chat template.
    """
    lead, gap, label = sink.rpartition("\n\n")
    before = lead + gap + "".join(f"{label} {text}\n\n" for text in texts) if texts else ""
    if form == "chat":
        if not tokenizer.chat_template:
            raise ConfigError("generate.prompt: this model has no chat template; use question or plain")
        return replace(chat(tokenizer, [{"role": "user", "content": before + question}]), query=question)
    asked = {"question": _QUESTION, "reference": _REFERENCE, "plain": "{question}"}[form].format(question=question)
    text = before + asked.lstrip("\n") if before else asked
    spans = Markers(tokenizer).spans(text)
    kept = len(text) - len(question) if form == "plain" else len(text)
    return Prompt(text, question, (), tuple(span for span in spans if span[1] <= kept))


def turn_head(tokenizer: Any) -> str:
    """The text that the chat template writes before the words of a user who begins the conversation.

    Raises `ConfigError` if the model has no chat template, or it does not keep the user's words as they are.
    """
    if not tokenizer.chat_template:
        raise ConfigError("memory.place: this model has no chat template; use start")
    mark = "<the user's words>"
    head, found, _ = chat(tokenizer, [{"role": "user", "content": mark}]).text.partition(mark)
    if not found:
        raise ConfigError("memory.place: this model's chat template changes the user's words; use start")
    return head


def chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> Prompt:
    """A conversation in the model's chat template, ready for the next answer. Raises `ConfigError` if it has none.

    Only the template's own markers are special tokens, not those in the words of the messages.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "model.path: this model has no chat template, so it cannot chat; ask single questions with `m3 ask`, or "
            "choose an instruct model"
        )
    contents, hidden = Markers(tokenizer).hidden([message["content"] for message in messages])
    turns = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
    try:
        written = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program of the model's author, and may raise anything
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model.path: the model's chat template refuses this conversation: {line}") from error
    text, spans = shown(written, hidden)
    earlier = [message["content"] for message in messages[:-1] if message["role"] == "user"]
    return Prompt(text, messages[-1]["content"], tuple(reversed(earlier)), spans)
