"""`condensed`: questions of a conversation, written by the model so that each can be understood alone."""

from collections.abc import Sequence
from dataclasses import replace

from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import GenerateConfig

_MOST = 8
"""Earlier messages that the model reads, the newest ones, as many as a search counts."""
_SETTINGS = GenerateConfig(max_new_tokens=32, stop=("\n",))
_EXAMPLES = """\
Rewrite the last message as a question that can be understood alone.

Messages:
- When was the bridge of Alder built?
- Who designed it?
Question: Who designed the bridge of Alder?

Messages:
- What is the height of the Tarn tower?
- And the colour?
Question: What is the colour of the Tarn tower?

Messages:
- Where was Mira Lund born?
- And the age?
- What does the Hask ferry carry?
Question: What does the Hask ferry carry?

Messages:
- Where was Mira Lund born?
- What does the Hask ferry carry?
- Who owns it?
Question: Who owns the Hask ferry?

Messages:
"""


def condensed(adapter: Adapter, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with a condensed query each: the model writes at most 32 tokens, the likeliest ones, for each.

    A prompt that follows on no message, or for which the model writes nothing, stays as it is. Raises what
    `Adapter.generate` does. Callable from any thread.
    """
    following = {prompt: _conversation(prompt) for prompt in prompts if prompt.query and prompt.context}
    answers = adapter.generate([Prompt(text) for text in following.values()], None, _SETTINGS)
    written = {prompt: answer.text.strip() for prompt, answer in zip(following, answers, strict=True)}
    return [replace(prompt, query=written[prompt]) if written.get(prompt) else prompt for prompt in prompts]


def _conversation(prompt: Prompt) -> str:
    messages = [*reversed(prompt.context[:_MOST]), prompt.query or ""]
    lines = "".join(f"- {' '.join(message.split())}\n" for message in messages)
    return f"{_EXAMPLES}{lines}Question:"
