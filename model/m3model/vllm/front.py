"""`FrontAdapter`: an adapter that reads prompts, and whose engine is vLLM. It writes no memories."""

# ruff: noqa: ARG002, ARG003 - what it cannot do has the arguments all the same

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from m3model.engine.job import Words
from m3model.engine.prompts import chat, render
from m3model.engine.tokens import PromptTokens
from m3model.loading.fingerprint import tokenizer_fingerprint
from m3model.vllm.engine import Core, VllmEngine
from m3runtime.adapters.answers import Form, Prompt
from m3runtime.adapters.base import Adapter
from m3runtime.adapters.engine import Engine
from m3runtime.bank.manifest import Manifest
from m3runtime.config.schema import MemoryConfig, ModelConfig
from m3runtime.errors import BankMismatchError, ConfigError, PromptTooLongError
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.runtime import Runtime


class FrontAdapter(Adapter):
    """What vLLM in this process and vLLM at a URL have in common, over the bank of an open runtime."""

    def __init__(
        self, runtime: Runtime, core: Core, tokenizer: Any, *, stop: frozenset[int], length: int, vocabulary: int
    ) -> None:
        """``stop`` are the tokens that end an answer, ``length`` is the most tokens of prompt and answer.

        The core is its own from here on.
        """
        manifest = runtime.bank.manifest
        self._core, self._tokenizer = core, tokenizer
        self._stop, self._length, self._vocabulary = stop, length, vocabulary
        self._tokens = PromptTokens(tokenizer, runtime.config.memory)
        self._device = runtime.device
        self.name, self.spec, self.sink = runtime.config.model.path, manifest.spec, self._tokens.sink
        self.model_fingerprint, self.model_settings = manifest.model, manifest.model_settings
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)

    @classmethod
    def open(cls, model: ModelConfig, memory: MemoryConfig, device: torch.device) -> Self:
        """It cannot be opened without a bank. Raises `ConfigError`."""
        raise ConfigError(
            f"model.adapter: {model.adapter} needs a bank: write that with transformers, and `m3 serve --engine`"
        )

    @property
    def device(self) -> torch.device:
        """See `Adapter.device`."""
        return self._device

    def check(self, manifest: Manifest, where: Path) -> None:
        """Raise `BankMismatchError` for another bank than that of its runtime, and for another tokenizer or sink."""
        super().check(manifest, where)
        if tuple(self._tokens.sink_ids) != self._core.head.sink:
            raise BankMismatchError(
                f"{where}: the sink has other tokens than for the bank; run `m3 calibrate-bias` again"
            )

    def count_tokens(self, text: str) -> int:
        """See `Adapter.count_tokens`."""
        return len(self._tokens.ids(text))

    def encode(self, references: Sequence[str]) -> MemoryTensors:
        """It cannot. Raises `ConfigError`."""
        raise ConfigError("model.adapter: vLLM writes no memories; set recall.cold_start to false")

    @cached_property
    def engine(self) -> Engine:
        """See `Adapter.engine`."""
        words = Words(lambda prompt, sink: self._tokens.of_prompt(prompt, sink=sink), self.text_of, lambda: self._stop)
        return VllmEngine(self._core, words, length=self._length, vocabulary=self._vocabulary)

    def render(self, question: str, form: Form, texts: Sequence[str] | None = None) -> Prompt:
        """See `Adapter.render`."""
        return render(self._tokenizer, question, form, sink=self.sink, texts=texts)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """See `Adapter.chat`."""
        return chat(self._tokenizer, messages)

    def count_prompt(self, prompt: Prompt, *, memories: bool) -> int:
        """See `Adapter.count_prompt`."""
        count = len(self._tokens.of_prompt(prompt, sink=memories))
        room = self._length - (len(self._core.head) if memories else 0)
        if count >= room:
            raise PromptTooLongError(f"the prompt has {count} tokens, and there is room for {room - 1}; shorten it")
        return count

    def text_of(self, tokens: Sequence[int]) -> str:
        """See `Adapter.text_of`."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def close(self) -> None:
        """End the engine. The runtime stays the caller's to close."""
        if "engine" in self.__dict__:
            self.engine.close()
        self._core.close()
