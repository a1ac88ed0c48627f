"""`Config` and its sections: every key of the configuration file, its type, its default and its meaning."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, WrapValidator, model_validator

from m3runtime.config import presets
from m3runtime.config.loading import load_config
from m3runtime.config.section import Count, File, FileOrHubName, Name, PluginSection, Section, Whole
from m3runtime.config.serve import ServeConfig
from m3runtime.config.train import TrainConfig
from m3runtime.config.units import Seconds, Size
from m3runtime.config.where import conditions

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
        raise ValueError(
            "must be all, a whole number of at least 1, or a list of such numbers for each memory layer, one for each "
            f"KV head, not {str(value)[:80]!r}"
        ) from None


def _where(value: object) -> object:
    conditions(value)  # raises
    return value


Layers = Annotated[Literal["all", "first-half", "middle-half"] | tuple[Whole, ...], WrapValidator(_layers)]
Budgets = tuple[Annotated[tuple[Count, ...], Field(min_length=1)], ...]
TokensPerHead = Annotated[
    Literal["all"] | Count | Annotated[Budgets, Field(min_length=1)], WrapValidator(_tokens_per_head)
]


class ModelConfig(Section):
    """The language model."""

    adapter: Name = "transformers"
    """The adapter between model and runtime: a plug-in's name or an import path ``package.module:Name``."""
    path: FileOrHubName
    """A local folder, a GGUF file or a hub name. ``./``, ``../`` and ``~/`` mark a local path."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """The dtype of computation; ``auto`` is float32 on a CPU, and the weights' own dtype on an accelerator."""
    device: Name = "auto"
    """The device of the whole runtime, such as ``cpu`` or ``cuda:1``; ``auto``: the accelerator if one is found."""
    rows: Count = 32
    """Most sequences that are decoded at once; further requests wait for a row."""
    room: Size | None = None
    """Most bytes of keys and values of all rows: sink, memories and context. Default: a half of what is free on the
    device, a quarter on a CPU. Where it is full, the youngest sequence waits and is read again later."""
    compile: bool = False
    """Compile the model's layers for decoding, at the first steps, which takes a minute or so. For GPUs alone."""
    pack: bool = True
    """On a CPU, keep the weights of linear layers a second time, in the layout that products are fastest in: a step
    takes half of the time with eight rows, three quarters with one. It takes as much memory again. Nothing is packed
    with ``compile``."""


class MemoryConfig(Section):
    """The parts of a reference that are kept, and how attention reads them; the same for a whole bank."""

    preset: Literal["memory3"] | None = None
    """Other defaults here and in `codec`, `embedder` and `recall`: ``memory3`` gives those of the Memory³ paper."""
    layers: Layers = "all"
    """The memory layers: ``all``, ``first-half``, ``middle-half``, a range such as ``8-23`` or a list of numbers."""
    tokens_per_head: TokensPerHead = "all"
    """Tokens of a reference that each KV head keeps: ``all``, or that many of those that receive most attention; or
    budgets, a list for each memory layer with a number for each KV head, as `m3 eval budgets` fits them."""
    select_by: Literal["attention", "repeat"] = "attention"
    """The attention that tokens are kept by: within the reference, as in Memory³; or that they receive from a model
    which reads the text a second time with all of the memory (``repeat``), which takes twice the time to write."""
    reference_tokens: Annotated[Whole, Field(ge=1, le=65_535)] = 128
    """Most tokens of a reference; longer texts are cut into several."""
    sink: str = "Reference:"
    """The text of the sink: after BOS, its keys and values stand once before all memories."""
    place: Literal["start", "turn"] = "start"
    """The place of sink and memories: before everything, or in the user's turn of the model's chat template."""
    sinks: Literal["once", "each"] = "once"
    """Attention reads the sink once, before all memories, or again before each of them."""
    positions: Literal["parallel", "sequential"] = "parallel"
    """Positions of memories: all in one interval, or in a row of intervals with the best memory last."""
    attention_temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """The divisor of attention logits between queries and memory keys: below 1 it sharpens attention to memories."""
    attention_weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """The factor by which attention weighs memories against sink and context, before it is normalised."""
    batch_size: Count = 16
    """References in one forward pass of the model while memories are written."""

    @model_validator(mode="before")
    @classmethod
    def _fill_by_preset(cls, values: object) -> object:
        return presets.fill(values.get("preset"), "memory", values) if isinstance(values, dict) else values


class CodecConfig(PluginSection):
    """The codec, which turns memories into bytes and back."""

    kind: Name = "product"
    """A plug-in's name or an import path; further keys are its options."""
    file: File | None = None
    """A trained codec for a new bank; null: a bank begins with int8, and a codec is trained on what is written."""
    sample_tokens: Count = 12_288
    """Tokens of memories that a codec is trained on, as soon as there are as many."""


class EmbedderConfig(PluginSection):
    """The embedder, which turns texts into the vectors that recall searches by."""

    kind: Name = "sentence-transformers"
    """A plug-in's name or an import path; further keys are its options."""
    path: FileOrHubName
    """A local folder or a hub name. ``./``, ``../`` and ``~/`` mark a local path."""


class IndexConfig(PluginSection):
    """The index, which finds the nearest vectors."""

    kind: Name = "usearch"
    """A plug-in's name or an import path; further keys are its options."""
    dtype: Name = "f16"
    """The dtype of the vectors in the index."""


class TierConfig(PluginSection):
    """One tier of the hierarchy, with options such as ``capacity: 2GiB``."""

    kind: Name
    """A plug-in's name or an import path; further keys are its options."""


class DocumentsConfig(Section):
    """The fields of a JSONL line. A dot leads into an object: ``meta.lang``."""

    text_field: Name = "text"
    """The field of the text."""
    id_field: Name | None = None
    """The field that names a line in citations; null: ``source``, else ``id``, else the line's number."""
    title_field: Name | None = "title"
    """The field of a title, which the text gets as a heading; null: none."""
    url_field: Name | None = "url"
    """The field of an address, which is cited; null: none."""
    expires_field: Name | None = None
    """The field of a line's last day, ``2027-01-31`` in UTC, after which the line is forgotten; null: none."""
    metadata_fields: tuple[Name, ...] = ()
    """Further fields to keep and to cite, each under its own name."""

    @model_validator(mode="after")
    def _keep_names_apart(self) -> Self:
        for name in self.metadata_fields:
            if name in ("record", "title", "url", "expires"):
                raise ValueError(f"metadata_fields must not have {name}, which has a meaning of its own")
        return self


class RerankerConfig(PluginSection):
    """The reranker, which reads a question together with each of the texts that a search found, and orders them."""

    kind: Name = "cross-encoder"
    """A plug-in's name or an import path; further keys are its options."""
    path: FileOrHubName
    """A local folder or a hub name. ``./``, ``../`` and ``~/`` mark a local path."""
    candidates: Count = 20
    """Texts that it reads, the nearest ones. The others stay behind them."""


class RecallConfig(Section):
    """The choice of memories for a chunk, and the time that it waits for them."""

    replaced: ClassVar[Mapping[str, str]] = {
        "in_flight": "recall.decoded bounds prefetched and leased memories together"
    }

    chunk_tokens: Count = 64
    """Tokens of a chunk: the distance between two recalls."""
    memories: Count = 5
    """Most memories of a chunk."""
    search: Literal["dense", "lexical", "hybrid"] = "dense"
    """The search: by embeddings, by words (BM25), or by both, joined by their ranks."""
    turn_weight: Annotated[float, Field(ge=0, le=10)] = 0.8
    """The weight, in the search for a message of a conversation, of an earlier one of the user that tells what it is
    about; 0: only the last message is searched by."""
    condense: bool = False
    """Search for a message of a conversation by a question that can be understood alone. The model writes it first."""
    question_weight: Annotated[float, Field(ge=0, le=10)] = 0.0
    """The weight of the question in the search for a chunk of its answer; 0: only the chunk is searched by."""
    names_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Subtracted from a memory's score, times the share of the names in the question, words with a capital or a digit,
    that its text lacks."""
    reranker: RerankerConfig | None = None
    """The order of the first memories that a search finds, by a model that reads them; null: as they are found."""
    min_score: Annotated[float, Field(ge=-1, le=1)] = 0.3
    """Memories that score lower are not recalled."""
    where: Annotated[Mapping[str, Any], BeforeValidator(_where)] = {}
    """Recall only memories with a place whose metadata is so: ``{lang: en, year: {at_least: 2020}, source: docs/}``."""
    margin: Annotated[float, Field(ge=0)] | None = None
    """Memories that score lower than the best by more than this are not recalled; null: no such limit."""
    distinct: bool = True
    """Recall once what several references say in the same sentences; all of their places are cited."""
    score_temperature: Annotated[float, Field(gt=0)] | None = 0.03
    """Attention weighs memories by ``exp((score - best) / this)``; null: all alike, as a Memory³ model is trained."""
    lookahead_tokens: Annotated[Whole, Field(ge=0)] = 16
    """Tokens before a chunk's end at which its memories are guessed and prefetched during decoding; 0: never."""
    choose_early: bool = False
    """Choose the memories of a chunk of an answer by its text without the last ``lookahead_tokens``: what is prefetched
    is then exactly what is recalled. For a home that answers later than ``deadline``, such as an object store."""
    decoded: Size | None = None
    """Most bytes of decoded memories on the device, prefetched and leased together; null: fits the machine."""
    deadline: Seconds = 0.05
    """Time that a recall waits, after its search, for memories that the background or another recall is loading.
    Embedding, the search, encoding cold references, and loading blocks of the fastest tier are not bounded."""
    when_late: Literal["wait", "skip", "next_chunk"] = "skip"
    """Memories that miss the deadline are waited for, skipped, or given to the next chunk."""
    refresh: Seconds | None = 2.0
    """Time after which a running process looks whether another one changed the bank; null: never."""
    cold_start: bool = False
    """Encode references of the catalogue at their first recall, and store them; otherwise they are not recalled."""
    trace: File | None = None
    """A file that records every request to the tiers, for `m3 bench eviction`; null: none."""

    def searched(self, chunk: Sequence[int]) -> Sequence[int]:
        """The tokens of a whole chunk of an answer by which the memories after it are chosen."""
        return chunk[: len(chunk) - self.lookahead_tokens] if self.choose_early else chunk

    @model_validator(mode="after")
    def _look_ahead_within_a_chunk(self) -> Self:
        if self.lookahead_tokens >= self.chunk_tokens:
            raise ValueError(
                f"lookahead_tokens ({self.lookahead_tokens}) must be less than chunk_tokens ({self.chunk_tokens})"
            )
        return self


class ThreadsConfig(Section):
    """Background threads, which work while the model decodes."""

    lookahead: Count = 2
    """Threads that embed, search, read and decode for hints, and that read blocks that miss the deadline."""
    cores: Count | None = None
    """Cores that each of these threads computes on; null: all that the model has on a CPU, and 1 beside a GPU."""


class MetricsConfig(Section):
    """Counters and events that a runtime publishes."""

    port: Annotated[Whole, Field(ge=1, le=65_535)] | None = None
    """The port on which Prometheus and `m3 top` read the counters; null: none."""
    address: Name = "127.0.0.1"
    """The address to listen on; `0.0.0.0` accepts connections from every network."""
    timeline: Annotated[Whole, Field(ge=0)] = 0
    """Events that the timeline keeps, the latest ones; 0: none."""


class GenerateConfig(Section):
    """Prompt and sampling of an answer."""

    prompt: Literal["question", "reference", "chat", "plain"] = "question"
    """The form of the prompt: ``Question: ... Answer:``, the same after a line that points to the references
    (``reference``), the model's chat template, or the plain text."""
    max_new_tokens: Count = 128
    """Most tokens of an answer."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """The temperature of sampling; 0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Tokens are drawn from the likeliest ones that together have this probability."""
    top_k: Annotated[Whole, Field(ge=0)] = 0
    """Tokens are drawn from this many likeliest ones; 0: from all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Tokens are drawn from those at least this many times as likely as the likeliest one."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1 it makes tokens less likely that are in the prompt or in the answer already."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from a token's logit for each time that it is in the answer already."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from a token's logit if it is in the answer already."""
    logit_bias: Mapping[Whole, float] = {}
    """Added to the logits of these token ids."""
    seed: Annotated[Whole, Field(ge=0)] = 0
    """The seed of sampling: equal seeds draw equal tokens."""
    stop: tuple[Name, ...] = ()
    """Texts that end an answer, in addition to the model's own end token."""
    stop_tokens: tuple[Whole, ...] = ()
    """Token ids that end an answer, in addition to the model's own."""
    log_probs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    """Report how likely each token was, and so many of the likeliest ones beside it; null: neither."""
    grounding: bool = False
    """Report the share of attention that each token gave to each memory."""
    grounding_floor: Annotated[float, Field(ge=0, le=1)] | None = None
    """Answers with less evidence, in a memory that was read, are marked as not grounded; null: none is."""


class Config(Section):
    """The whole configuration. Each section is described by its class."""

    bank: File
    """The bank's folder."""
    model: ModelConfig
    memory: MemoryConfig = MemoryConfig()
    codec: CodecConfig = CodecConfig()
    embedder: EmbedderConfig
    index: IndexConfig = IndexConfig()
    tiers: tuple[TierConfig, ...] = ()
    """The tiers, fastest first, the home last; empty: tiers that fit the device and the machine."""
    documents: DocumentsConfig = DocumentsConfig()
    recall: RecallConfig = RecallConfig()
    threads: ThreadsConfig = ThreadsConfig()
    metrics: MetricsConfig = MetricsConfig()
    generate: GenerateConfig = GenerateConfig()
    serve: ServeConfig = ServeConfig()
    train: TrainConfig | None = None
    """Training of the model to read memories, by `m3 train`; null: none."""

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
        """The same configuration without cold start, for commands that only read a bank."""
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
