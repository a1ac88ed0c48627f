"""The `Adapter` contract: joins a language model to the runtime."""

# ruff: noqa: ARG002, ARG003 - an adapter that leaves methods out has the arguments of those that have them

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from m3runtime.adapters.answers import Answer, Form, OnText, Prompt, Score
from m3runtime.adapters.engine import Engine, Request, answers
from m3runtime.bank.manifest import Manifest
from m3runtime.errors import ConfigError, InputError
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors

if TYPE_CHECKING:
    import torch

    from m3runtime.config.schema import GenerateConfig, MemoryConfig, ModelConfig
    from m3runtime.memory.shape import ModelShape
    from m3runtime.stream import Recaller, Stream


class Adapter(ABC):
    """Computes memories from references; the methods from `engine` on let the ``m3`` commands talk with the model.

    An inference stack that has a loop of its own leaves those out, and hands streams to its loop instead.

    Parity law: a memory of all layers and tokens, not quantised, at its own positions, gives the logits of the same
    text in the context (float32: 1e-4). One call at a time, except where stated.
    """

    spec: MemorySpec
    name: str
    """The model's name, for people."""
    model_fingerprint: str
    """Equal for models that compute the same memories; a bank records it."""
    model_settings: Mapping[str, Any] = MappingProxyType({})
    """The settings that the fingerprint covers, as JSON has them. A bank records them, to name a difference later."""
    tokenizer_fingerprint: str
    sink: str
    """The constant prefix that stands before all memories, and before each reference while it is encoded."""

    grounds: ClassVar[bool] = False
    """Do answers tell what ``generate.grounding`` asks for? An engine that does not know it refuses such a request."""

    @classmethod
    @abstractmethod
    def open(cls, model: "ModelConfig", memory: "MemoryConfig", device: "torch.device") -> "Adapter":
        """Load the model on ``device``.

        ``model`` and ``memory`` are these sections of the configuration. ``device`` is what ``model.device`` names,
        resolved: an accelerator has an index. Raises `ConfigError` with one line if there is no such model, or it
        cannot have such memories.
        """

    @classmethod
    def over(cls, runtime: "Recaller", device: "torch.device", options: Mapping[str, Any]) -> "Adapter":
        """The adapter that answers over an open runtime. ``options`` are those of the plug-in.

        Raises `ConfigError` as `open` does, and for options that it does not know.
        """
        if options:
            raise ConfigError(f"this engine has no option {next(iter(options))}; it is configured by model")
        return cls.open(runtime.config.model, runtime.config.memory, device)

    @classmethod
    def shape(cls, model: "ModelConfig") -> "ModelShape":
        """The shape of a model that is not loaded. Raises `ConfigError` with one line if it cannot be told."""
        raise ConfigError(f"model.adapter: {model.adapter} does not tell the shape of a model; say it with --shape")

    @classmethod
    def carried(cls, model: "ModelConfig", memory: "MemoryConfig") -> "MemoryConfig":
        """The memory settings in force: a model that was trained to read memories carries its own."""
        return memory

    @property
    @abstractmethod
    def device(self) -> "torch.device":
        """The device of the model, and of the memories it reads; an accelerator has an index."""

    @property
    @abstractmethod
    def dtype(self) -> "torch.dtype":
        """The dtype of keys and values in the model's attention."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """The number of tokens of a reference of this text, without the sink's. Callable from any thread."""

    def cut(self, text: str, tokens: int) -> list[str]:
        """A text in consecutive pieces of ``tokens`` tokens each, the last with fewer; joined they are the text.

        No character is cut: a piece has fewer tokens where its last one would be a part of a character, and more only
        if it is one character that has more. Raises `InputError` if ``tokens`` is not at least 1.
        """
        raise self._cannot_talk()

    @abstractmethod
    def encode(self, references: Sequence[str]) -> MemoryTensors:
        """The memories of one batch of references, on the model's device.

        Raises `InputError` for a reference that is blank or has more than ``spec.reference_tokens`` tokens.
        """

    def importance(self, references: Sequence[str]) -> "torch.Tensor | None":
        """The mean cost of an error in a token's keys and values over these references, or None if it is not known.

        ``float32[layers, n, n]`` on the CPU, ``n`` of ``2 * kv_heads * head_dim``: symmetric matrices over keys of all
        heads, then values. Codecs that learn spend their bytes by it, see `m3runtime.codecs.base.Codec.fit`. Raises
        `InputError` as `encode` does.
        """
        return None

    @property
    def engine(self) -> Engine:
        """The engine that decodes with this model, one for each adapter."""
        raise self._cannot_talk()

    def generate(
        self,
        prompts: Sequence[Prompt],
        streams: "Sequence[Stream] | None",
        settings: "GenerateConfig",
        on_text: OnText | None = None,
    ) -> list[Answer]:
        """Continue each prompt by the `engine`, reading the memories that its stream recalls at every chunk.

        ``streams`` is None for the model as it is, without sink and memories. Raises `InputError` for a prompt without
        tokens. Callable from any thread.
        """
        check_streams(prompts, streams)
        theirs = streams if streams is not None else [None] * len(prompts)
        requests = [Request(prompt, settings, stream) for prompt, stream in zip(prompts, theirs, strict=True)]
        return answers(self.engine, requests, on_text) if requests else []

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], streams: "Sequence[Stream] | None"
    ) -> list[Score]:
        """The likelihood of each continuation after its prompt; memories are recalled as if it were being generated.

        Raises `InputError` for a prompt or a continuation without tokens.
        """
        raise self._cannot_talk()

    def examine(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[str | None],
        streams: "Sequence[Stream] | None",
        settings: "GenerateConfig",
    ) -> list[tuple[Answer, Score | None]]:
        """The results of `generate` and `score`. A continuation that is None is not scored."""
        answers = self.generate(prompts, streams, settings)
        wanted = [row for row, text in enumerate(continuations) if text is not None]
        scores: list[Score | None] = [None] * len(prompts)
        found = self.score(
            [prompts[row] for row in wanted],
            [continuations[row] or "" for row in wanted],
            None if streams is None else [streams[row] for row in wanted],
        )
        for row, score in zip(wanted, found, strict=True):
            scores[row] = score
        return list(zip(answers, scores, strict=True))

    def with_memory(self, memory: "MemoryConfig") -> "Adapter":
        """An adapter of the same loaded model with other memory settings. Both may be used, one call at a time."""
        raise self._cannot_talk()

    def render(self, question: str, form: Form, texts: Sequence[str] | None = None) -> Prompt:
        """The prompt that asks a question; with ``texts``, with these references in it. Raises `ConfigError`."""
        raise self._cannot_talk()

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """The prompt of a conversation, ``role`` and ``content`` of each message; the last one is the query."""
        raise self._cannot_talk()

    def count_prompt(self, prompt: Prompt, *, memories: bool) -> int:
        """The number of tokens of a prompt, as the engine reads it: with ``memories`` those after the sink.

        Callable from any thread. Raises `InputError` if the model has too few positions for it.
        """
        raise self._cannot_talk()

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens; a part of a character is U+FFFD. Callable from any thread."""
        raise self._cannot_talk()

    def close(self) -> None:  # noqa: B027 - an adapter whose model belongs to a stack gives nothing back
        """Drop the model."""

    def check(self, manifest: Manifest, where: Path) -> None:
        """Raise `BankMismatchError` that names the difference, unless this adapter can read the bank at ``where``."""
        manifest.check_model(
            model=self.model_fingerprint,
            name=self.name,
            tokenizer=self.tokenizer_fingerprint,
            sink=self.sink,
            spec=self.spec,
            where=where,
        )

    def _cannot_talk(self) -> ConfigError:
        return ConfigError(f"model.adapter: {type(self).__name__} only writes memories, it does not generate by itself")


def check_streams(prompts: Sequence[Prompt], streams: "Sequence[Stream] | None") -> None:
    """Raise `InputError` unless each prompt has a stream, or none has."""
    if streams is not None and len(streams) != len(prompts):
        raise InputError(f"{len(prompts)} prompts, but {len(streams)} streams")
