"""The configuration: one YAML file, every key of it described here. `m3runtime.config.loading` reads it."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, WrapValidator, model_validator

from m3runtime.config import presets
from m3runtime.config.loading import load_config
from m3runtime.config.section import Count, File, FileOrHubName, Name, PluginSection, Section, Whole
from m3runtime.config.train import TrainConfig
from m3runtime.config.units import Seconds, Size

_RANGE = re.compile(r"([0-9]{1,4})-([0-9]{1,4})", re.ASCII)


def _layers(value: object, validate: Callable[[object], Any]) -> Any:
    ends = _RANGE.fullmatch(value) if isinstance(value, str) else None
    try:
        layers = validate(tuple(range(int(ends[1]), int(ends[2]) + 1)) if ends else value)
    except ValidationError:
        layers = ()
    if not layers or (isinstance(layers, tuple) and (layers[0] < 0 or list(layers) != sorted(set(layers)))):
        raise ValueError(
            "must be all, first-half, middle-half, a range such as 8-23 or a list of ascending layer numbers, "
            f"not {value!r}"
        )
    return layers


def _tokens_per_head(value: object, validate: Callable[[object], Any]) -> Any:
    try:
        return validate(value)
    except ValidationError:
        raise ValueError(f"must be all or a whole number of at least 1, not {value!r}") from None


Layers = Annotated[Literal["all", "first-half", "middle-half"] | tuple[Whole, ...], WrapValidator(_layers)]
TokensPerHead = Annotated[Literal["all"] | Count, WrapValidator(_tokens_per_head)]


class ModelConfig(Section):
    """The language model."""

    adapter: Name = "transformers"
    """What joins the model to the runtime: a plug-in's name or an import path ``package.module:Name``."""
    path: FileOrHubName
    """A local folder, a GGUF file or a hub name. From ``./`` or ``../`` on it is relative to the file that says so."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """What to compute in; ``auto`` is float32 on a CPU, and what the weights are stored in on an accelerator."""
    device: Name = "auto"
    """Where to compute, such as ``cpu`` or ``cuda:1``; ``auto`` is the accelerator, if there is one."""


class MemoryConfig(Section):
    """What is kept of a reference, and how attention reads it. A bank holds memories of one such shape."""

    preset: Literal["memory3"] | None = None
    """Other defaults here and of `codec`, `embedder` and `recall`: ``memory3`` has those of the Memory³ paper."""
    layers: Layers = "all"
    """The memory layers: ``all``, ``first-half``, ``middle-half``, a range such as ``8-23`` or a list of numbers."""
    tokens_per_head: TokensPerHead = "all"
    """Tokens of a reference that each KV head keeps: ``all``, or how many of those that receive the most attention."""
    reference_tokens: Annotated[Whole, Field(ge=1, le=65_535)] = 128
    """Most tokens of a reference."""
    sink: str = "Reference:"
    """The text after BOS whose keys and values stand once before all memories."""
    place: Literal["start", "turn"] = "start"
    """Where the sink and memories stand: before everything, or in the user's turn of the model's chat template."""
    sinks: Literal["once", "each"] = "once"
    """Whether attention reads the sink once, before all memories, or also before each of them."""
    positions: Literal["parallel", "sequential"] = "parallel"
    """Where memories stand: all in one interval of positions, or in a row of intervals with the best one last."""
    attention_temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Attention logits between queries and memory keys are divided by it: below 1 sharpens attention to memories."""
    batch_size: Count = 16
    """References that the model reads at once while memories are written."""

    @model_validator(mode="before")
    @classmethod
    def _fill_by_preset(cls, values: object) -> object:
        return presets.fill(values.get("preset"), "memory", values) if isinstance(values, dict) else values


class CodecConfig(PluginSection):
    """How memories become bytes."""

    kind: Name = "product"
    """A plug-in's name or an import path; further keys are its options."""
    file: File | None = None
    """A trained codec for a new bank, relative to the file that says so; null: one is trained on what is written."""


class EmbedderConfig(PluginSection):
    """What turns texts into the vectors that recall searches by."""

    kind: Name = "sentence-transformers"
    """A plug-in's name or an import path; further keys are its options."""
    path: FileOrHubName
    """A local folder or a hub name. From ``./`` or ``../`` on it is relative to the file that says so."""


class IndexConfig(PluginSection):
    """What finds the nearest vectors."""

    kind: Name = "usearch"
    """A plug-in's name or an import path; further keys are its options."""
    dtype: Name = "f16"
    """What the index stores vectors in."""


class TierConfig(PluginSection):
    """One tier of the hierarchy, with options such as ``capacity: 2GiB``."""

    kind: Name
    """A plug-in's name or an import path; further keys are its options."""


class RecallConfig(Section):
    """Which memories a chunk gets, and how long it waits for them."""

    replaced: ClassVar[Mapping[str, str]] = {
        "in_flight": "recall.decoded bounds prefetched and leased memories together"
    }

    chunk_tokens: Count = 64
    """Tokens between two recalls."""
    memories: Count = 5
    """Most memories of a chunk."""
    min_score: Annotated[float, Field(ge=-1, le=1)] = 0.3
    """Memories that score lower are not recalled."""
    margin: Annotated[float, Field(ge=0)] | None = None
    """Memories that score lower than the best by more than this are not recalled; null: no such limit."""
    score_temperature: Annotated[float, Field(gt=0)] | None = 0.03
    """Attention weighs memories by ``exp((score - best) / this)``; null: all alike, as a Memory³ model is trained."""
    lookahead_tokens: Annotated[Whole, Field(ge=0)] = 16
    """Tokens before a chunk's end at which its memories are guessed, and brought beside decoding; 0: never."""
    decoded: Size | None = None
    """Most bytes of decoded memories on the device, prefetched and leased together; null: fits the machine."""
    deadline: Seconds = 0.05
    """How long a recall waits, after its search, for memories that are still being read or decoded in the background.
    Embedding, the search, and decoding what the fastest tier holds are not bounded by it."""
    when_late: Literal["wait", "skip", "next_chunk"] = "skip"
    """For memories that miss the deadline: wait for them, go on without, or give them to the next chunk."""
    cold_start: bool = False
    """Whether references that are only in the catalogue are encoded at their first recall, and stored; else they are
    not recalled."""
    trace: File | None = None
    """A file to record into what is asked of the tiers, relative to the file that says so; null: none."""

    @model_validator(mode="after")
    def _look_ahead_within_a_chunk(self) -> Self:
        if self.lookahead_tokens >= self.chunk_tokens:
            raise ValueError(
                f"lookahead_tokens ({self.lookahead_tokens}) must be less than chunk_tokens ({self.chunk_tokens})"
            )
        return self


class ThreadsConfig(Section):
    """What works beside decoding, so that it takes no more of the machine than it should."""

    lookahead: Count = 2
    """Threads that embed, search, read and decode for hints, and read what a recall must not wait for."""
    cores: Count = 1
    """Cores that each of them computes on."""


class MetricsConfig(Section):
    """What a runtime shows of itself."""

    port: Annotated[Whole, Field(ge=1, le=65_535)] | None = None
    """Where Prometheus, and `m3 top`, can read them; null: nowhere."""
    address: Name = "127.0.0.1"
    """The address that is listened at; `0.0.0.0` is every network's."""
    timeline: Annotated[Whole, Field(ge=0)] = 0
    """How many of the last events a timeline keeps; 0: none."""


class GenerateConfig(Section):
    """How answers are written."""

    prompt: Literal["question", "reference", "chat", "plain"] = "question"
    """What the model is given: ``Question: ... Answer:``, the same after a line that points to the references
    (``reference``), its chat template, or the text as it is."""
    max_new_tokens: Count = 128
    """Most tokens of an answer."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most likely token; above, tokens are drawn."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Tokens are drawn among the likeliest that have this probability together."""
    top_k: Annotated[Whole, Field(ge=0)] = 0
    """Tokens are drawn among so many likeliest ones; 0: among all."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1 makes tokens less likely that were written already."""
    seed: Annotated[Whole, Field(ge=0)] = 0
    """Equal seeds draw equal tokens."""
    stop: tuple[Name, ...] = ()
    """Texts at which an answer ends, besides the model's own end."""


class Config(Section):
    """Everything that can be set."""

    bank: File
    """The bank's folder, relative to the file that says so."""
    model: ModelConfig
    """The language model."""
    memory: MemoryConfig = MemoryConfig()
    """What is kept of a reference, and how attention reads it."""
    codec: CodecConfig = CodecConfig()
    """How memories become bytes."""
    embedder: EmbedderConfig
    """What turns texts into vectors."""
    index: IndexConfig = IndexConfig()
    """What finds the nearest vectors."""
    tiers: tuple[TierConfig, ...] = ()
    """The tiers, fastest first, the home last. Empty: those that fit the device and the machine."""
    recall: RecallConfig = RecallConfig()
    """Which memories a chunk gets, and how long it waits for them."""
    threads: ThreadsConfig = ThreadsConfig()
    """What works beside decoding, so that it takes no more of the machine than it should."""
    metrics: MetricsConfig = MetricsConfig()
    """What a runtime shows of itself."""
    generate: GenerateConfig = GenerateConfig()
    """How answers are written."""
    train: TrainConfig | None = None
    """How `m3 train` makes the model learn to read memories; null: it does not."""

    @model_validator(mode="before")
    @classmethod
    def _fill_by_preset(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        memory = values.get("memory")  # which fills itself
        preset = memory.get("preset") if isinstance(memory, dict) else getattr(memory, "preset", None)
        filled = {name: presets.fill(preset, name, values.get(name)) for name in ("codec", "embedder", "recall")}
        return {**values, **{name: section for name, section in filled.items() if section is not None}}

    def without_cold_start(self) -> "Config":
        """The same, by which nothing is encoded at recall: for what only reads a bank."""
        return self.model_copy(update={"recall": self.recall.model_copy(update={"cold_start": False})})

    @classmethod
    def load(
        cls,
        path: Path | str | None = None,
        environ: Mapping[str, str] | None = None,
        overrides: Mapping[str, str] | None = None,
    ) -> Self:
        """The configuration in force: file, environment and overrides, as `m3runtime.config.loading.load_config` says.

        Raises `ConfigError`: one line that names the origin, the key and the values that are allowed.
        """
        return load_config(cls, path, environ, overrides).config
