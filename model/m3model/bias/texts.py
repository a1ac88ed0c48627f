"""The text that a calibration reads: references as the turns of a conversation, as a served model sees them."""

from collections.abc import Sequence
from itertools import cycle

from m3model.engine.prompts import chat
from m3model.engine.tokens import PromptTokens
from m3runtime.adapters.answers import Prompt
from m3runtime.errors import ConfigError, InputError


def served_ids(tokens: PromptTokens, texts: Sequence[str], length: int) -> list[int]:
    """Exactly ``length`` tokens of a context of these texts, which are repeated where they are too short.

    They are turns in the model's chat template, for queries of its markers are unlike others; without a template they
    are paragraphs. Raises `InputError` if the texts have no tokens.
    """
    turns: list[str] = []
    missing = length
    for text in cycle(texts):
        if missing <= 0:
            break
        turns.append(text)
        missing -= (count := len(tokens.ids(text)))
        if not count:
            raise InputError("a text without tokens cannot be read")
    ids = _conversation(tokens, turns)
    if len(ids) < length:  # no template, or one that drops turns
        ids = [token for text in turns for token in tokens.ids(f"{text}\n\n")]
    return ids[:length]


def _conversation(tokens: PromptTokens, turns: Sequence[str]) -> list[int]:
    """The tokens of a conversation after the sink; none if the model's template does not take it."""
    roles = cycle(("user", "assistant"))
    try:
        prompt: Prompt = chat(tokens.tokenizer, [{"role": role, "content": text} for role, text in zip(roles, turns)])  # noqa: B905
    except ConfigError:  # no template, or one that refuses
        return []
    return tokens.of_prompt(prompt, sink=True)
