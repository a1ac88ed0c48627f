"""The `Adapter` contract: what joins a language model to the runtime."""

# ruff: noqa: ARG002 - what an adapter leaves out takes the arguments of those that have it

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from m3runtime.bank import Manifest
from m3runtime.errors import ConfigError
from m3runtime.memory import Memories
from m3runtime.shape import ModelShape
from m3runtime.spec import MemorySpec

if TYPE_CHECKING:
    import torch

    from m3runtime.config import Config, GenerateConfig, MemoryConfig, ModelConfig
    from m3runtime.stream import Recalled, Stream


Form = Literal["question", "reference", "chat", "plain"]
"""How a question is put to a model: see ``generate.prompt``."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a sequence begins with.

    ``query`` is what memories are searched for while the prompt is read, if that is not the prompt's own text: a
    question without the words of its template, for example.
    """

    text: str
    query: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated after a prompt."""

    text: str
    tokens: tuple[int, ...]
    """Generated token ids, a stop token left out."""
    stopped_by: Literal["token", "text", "length"]
    chunks: "tuple[Recalled, ...]" = field(repr=False)
    """What was recalled, in order: for each chunk of the prompt, then for each chunk of 64 generated tokens."""
    first_token_s: float
    """Seconds from the call to the first token, recall included."""
    tokens_per_s: float
    """Tokens a second after the first; 0 if there was only one."""

    @property
    def memories(self) -> "Mapping[int, float]":
        """The ids that were read, and the highest score each had."""
        best: dict[int, float] = {}
        for chunk in self.chunks:
            for id, score in zip(chunk.ids, chunk.scores, strict=True):
                best[id] = max(score, best.get(id, -1.0))
        return best


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a model found a continuation."""

    log_probs: tuple[float, ...]
    """Natural logarithm of the probability of each of its tokens, given what stands before it."""
    chunks: "tuple[Recalled, ...]" = field(repr=False)
    """As of an `Answer`."""


OnText = Callable[[int, str], None]
"""Called with the row of the batch and the text that has become certain since the last call."""


class Adapter(ABC):
    """Computes memories from references; the methods from `generate` on let the ``m3`` commands talk with the model.

    An inference stack that has a loop of its own leaves those out, and hands streams to its loop instead.

    Parity law: a memory of all layers and tokens, not quantised, at its own positions, gives the logits of the same
    text in the context (float32: 1e-4). One call at a time, except where stated.
    """

    spec: MemorySpec
    name: str
    """What the model is called, for people."""
    model_fingerprint: str
    tokenizer_fingerprint: str
    sink: str
    """The constant prefix that stands before all memories, and before each reference while it is encoded."""

    @classmethod
    @abstractmethod
    def open(cls, model: "ModelConfig", memory: "MemoryConfig") -> "Adapter":
        """Load the model. Raises `ConfigError` with one line if there is none, or it cannot have such memories."""

    @property
    @abstractmethod
    def device(self) -> "torch.device":
        """Where the model runs and memories are decoded."""

    @property
    @abstractmethod
    def dtype(self) -> "torch.dtype":
        """What the model's attention computes in."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Tokens that a reference of this text has, the sink's left out. Callable from any thread."""

    def cut(self, text: str, tokens: int) -> list[str]:
        """A text in consecutive pieces of ``tokens`` tokens each, the last with fewer; joined they are the text.

        No character is cut: a piece has fewer tokens where its last one would be a part of a character, and more only
        if it is one character that has more. Raises `InputError` if ``tokens`` is not at least 1.
        """
        raise self._cannot_talk()

    @abstractmethod
    def encode(self, references: Sequence[str]) -> Memories:
        """The memories of one batch of references, on the model's device.

        Raises `InputError` for a reference that is blank or has more than ``spec.reference_tokens`` tokens.
        """

    def generate(
        self,
        prompts: Sequence[Prompt],
        streams: "Sequence[Stream] | None",
        settings: "GenerateConfig",
        on_text: OnText | None = None,
    ) -> list[Answer]:
        """Continue each prompt, reading the memories that its stream recalls at every chunk.

        ``streams`` is None for the model as it is, without sink and memories. Raises `InputError` for a prompt without
        tokens.
        """
        raise self._cannot_talk()

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], streams: "Sequence[Stream] | None"
    ) -> list[Score]:
        """How likely each continuation is after its prompt: memories are recalled as if it were being generated.

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
        """What `generate` and `score` give; adapters that can read the prompts once for both.

        A continuation that is None is not scored.
        """
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

    def close(self) -> None:  # noqa: B027 - an adapter whose model belongs to a stack gives nothing back
        """Give back the model."""

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


@runtime_checkable
class Weighing(Protocol):
    """An adapter that knows what errors in its memories cost. Codecs that learn give their bytes where it is most."""

    def importance(self, references: Sequence[str]) -> "torch.Tensor":
        """What an error in a token's keys and values costs, on average over these references.

        ``float32[layers, n, n]`` on the CPU, ``n`` of ``2 * kv_heads * head_dim``: symmetric matrices over keys of all
        heads, then values. See `m3runtime.codecs.base.Codec.fit`. Raises `InputError` as `Adapter.encode` does.
        """


@runtime_checkable
class Sizing(Protocol):
    """What the class of an adapter has that can tell a model's shape without loading it."""

    def shape(self, model: "ModelConfig") -> ModelShape:
        """From what is written beside the weights. Raises `ConfigError` with one line if it cannot be told."""

    def carried(self, model: "ModelConfig", memory: "MemoryConfig") -> "MemoryConfig":
        """The memory settings in force: a model that was trained to read memories carries its own."""


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage of training that is done."""

    name: str
    """``warmup`` or ``memory``."""
    steps: int
    losses: tuple[tuple[int, float], ...]
    """Steps, and the mean loss of predicting a token, in nats, over the steps since the one before."""
    path: str
    """The folder of the model after this stage."""


@dataclass(frozen=True, slots=True)
class TrainReport:
    """A training that is done."""

    stages: tuple[StageReport, ...]
    path: str
    """The folder of the trained model, for ``model.path``."""
    sequences: int
    tokens: int
    """Of all sequences."""
    references: int
    retrieving: float
    """Share of chunks that retrieved a reference."""


@runtime_checkable
class Trainable(Protocol):
    """An adapter, the class itself, that can make a model learn to read memories."""

    @classmethod
    def train(cls, config: "Config", progress: "Callable[[str, int, int], None]") -> TrainReport:
        """Train as ``config.train`` says, or go on where an equal run stopped; see `m3 train`.

        ``progress`` is called with ``retrieve``, ``warmup`` or ``memory``, what is done of it, and all of it. Raises
        `ConfigError`, and `InputError` for texts that there is nothing to learn from.
        """


@dataclass(frozen=True, slots=True)
class PlainRun:
    """What a model wrote by itself after a batch of prompts."""

    tokens: tuple[tuple[int, ...], ...]
    """Of each prompt, exactly as many as were asked for."""
    first_token_s: float
    """Seconds from the call to the first tokens."""
    seconds: float
    """Seconds of the whole call."""


class Baseline(Protocol):
    """A model as its own library runs it: what benchmarks compare with."""

    variants: tuple[str, ...]
    """Ways in which the library can run it, such as its kinds of attention and of caches."""
    weight_bytes: int
    """Bytes of weights that a decoding step reads."""

    def generate(self, prompts: Sequence[Prompt], new_tokens: int, variant: str, room: int) -> PlainRun:
        """Continue each prompt by the likeliest tokens, exactly ``new_tokens`` of them, whatever they are.

        ``room`` is how many tokens, the prompt's included, a cache of fixed size is made for. Raises what the library
        raises for a variant that cannot be run here.
        """

    def endless(self) -> Adapter:
        """An adapter of the same loaded model, at whose tokens no answer ends."""


@runtime_checkable
class Comparable(Protocol):
    """An adapter whose model can also be run without anything of ours."""

    def baseline(self) -> Baseline:
        """That model, of which one call at a time may run: the adapter's or the baseline's."""
