"""`MemoryModel`: a model of the transformers library that reads memories, in a few lines."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

from pydantic import ValidationError

from m3model.adapter import TransformersAdapter
from m3runtime.adapters.answers import Answer, OnText, Prompt
from m3runtime.adapters.base import Adapter
from m3runtime.assembly import open_adapter
from m3runtime.config.schema import GenerateConfig
from m3runtime.errors import ConfigError, InputError
from m3runtime.plugins.messages import not_known, reason
from m3runtime.runtime import Runtime

__all__ = ["MemoryModel", "TransformersAdapter"]


class MemoryModel:
    """A model that reads memories while it generates, in a few lines. One call at a time.

    Without a runtime it is the model as it is.
    """

    def __init__(self, adapter: Adapter, runtime: Runtime | None = None) -> None:
        """Join an opened model with a runtime, which it also encodes for if ``recall.cold_start`` asks for that.

        Raises `BankMismatchError` if the runtime's bank was written by another model, tokenizer, sink or spec, and
        `ConfigError` if the runtime computes on another device.
        """
        self.adapter = adapter
        self.runtime = runtime
        if runtime is None:
            return
        adapter.check(runtime.bank.manifest, runtime.bank.path)
        if adapter.device != runtime.device:
            raise ConfigError(
                f"model.device: the model is on {adapter.device}, but the runtime computes on {runtime.device}; "
                "open both on one device"
            )
        if runtime.encoder is None:
            runtime.encoder = adapter

    @classmethod
    def open(cls, runtime: Runtime) -> Self:
        """Load the model of the runtime's configuration, in its dtype, on the runtime's device.

        Raises `ConfigError` with one line if there is none, and `BankMismatchError` if the bank is another model's.
        """
        return cls(open_adapter(runtime.config, runtime.device), runtime)

    def generate(self, question: str | Sequence[str], *, on_text: OnText | None = None, **settings: Any) -> Any:
        """Answer a question, or several at once: an `Answer`, or a list of them.

        ``settings`` are those of the configuration's ``generate`` section and take precedence over it: ``prompt``,
        ``max_new_tokens``, ``temperature``, ``stop`` and so on.
        """
        one = isinstance(question, str)
        questions = [question] if isinstance(question, str) else list(question)
        config = self._config(settings)
        prompts = [self.adapter.render(text, config.prompt) for text in questions]
        answers = self._run(prompts, config, on_text)
        return answers[0] if one else answers

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, on_text: Callable[[str], None] | None = None, **settings: Any
    ) -> Answer:
        """The next message of a conversation in the model's chat template."""
        if not messages:
            raise InputError("a conversation has at least one message")
        show = None if on_text is None else lambda _, text: on_text(text)
        return self._run([self.adapter.chat(messages)], self._config(settings), show)[0]

    def _config(self, settings: Mapping[str, Any]) -> GenerateConfig:
        base = self.runtime.config.generate if self.runtime else GenerateConfig()
        try:
            return GenerateConfig.model_validate({**base.model_dump(), **settings})
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            if key not in GenerateConfig.model_fields:
                raise ConfigError(not_known("generate", key, GenerateConfig.model_fields)) from None
            raise ConfigError(f"generate.{key} {reason(first)}") from None

    def _run(self, prompts: list[Prompt], config: GenerateConfig, on_text: OnText | None) -> list[Answer]:
        if self.runtime is None:
            return self.adapter.generate(prompts, None, config, on_text)
        with ExitStack() as closing:
            streams = [closing.enter_context(self.runtime.stream(self.adapter.dtype)) for _ in prompts]
            return self.adapter.generate(prompts, streams, config, on_text)
