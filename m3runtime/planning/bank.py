"""What a bank will weigh, what tiers hold of it, what it costs to write and read, and what a drive allows.

Everything is computed from sizes; nothing is loaded, written or timed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from m3runtime import assembly
from m3runtime.adapters.abilities import Sizing
from m3runtime.bank.bank import slot_bytes
from m3runtime.errors import ConfigError
from m3runtime.memory.shape import ModelShape, memory_spec
from m3runtime.memory.spec import MemorySpec
from m3runtime.planning.cost import Cost, cost
from m3runtime.plugins.loading import load
from m3runtime.storage.defaults import default_tiers
from m3runtime.writing import codec_files

if TYPE_CHECKING:
    from m3runtime.config.schema import Config

PAGE = 4096
"""Bytes that a drive reads at least."""
_HALF = 2
"""Bytes of a bfloat16."""
_FLOAT = 4
"""Bytes of a number of an embedding, as a home stores it."""


@dataclass(frozen=True, slots=True)
class Drive:
    """What a drive can do, as far as that is said. ``speed`` is tokens a second of one stream."""

    bandwidth: int | None = None
    """Bytes a second."""
    iops: int | None = None
    """Reads a second, of any size."""
    speed: float | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """What is planned for."""

    references: int
    """All full: ``memory.reference_tokens`` tokens."""
    text_bytes: int
    """Bytes of one reference's text."""
    dim: int
    """Numbers of an embedding."""
    capacities: tuple[int, ...] = ()
    """Bytes of tiers to be tried besides the configured ones."""
    drive: Drive = Drive()


@dataclass(frozen=True, slots=True)
class MemoryBytes:
    """Bytes of the memory of one full reference, step by step."""

    raw: int
    """Every layer, token and query head in bfloat16: the paper counts as if no heads shared keys and values."""
    cache: int
    """The same of every KV head: what a model's cache of the reference takes."""
    kept: int
    """The layers, KV heads and tokens of the spec, in bfloat16."""
    payload: int
    """What the codec makes of that. A codec that is still to be trained may make less."""
    block: int
    """The payload and its header: what every tier holds."""


@dataclass(frozen=True, slots=True)
class BankBytes:
    """Bytes of what a bank's home stores for all references. Not counted: the home's own books, and the index."""

    blocks: int
    texts: int
    embeddings: int
    total: int


@dataclass(frozen=True, slots=True)
class Room:
    """How many memories a caching tier holds: whole slots."""

    tier: str
    capacity: int
    memories: int
    share: float
    """Of the bank, at most 1."""


@dataclass(frozen=True, slots=True)
class Reads:
    """What a drive allows if no tier above it holds anything: every memory of every chunk is read, once each."""

    read_bytes: int
    """Of one block, in whole pages."""
    limit: str
    """``bandwidth`` or ``iops``: what runs out first."""
    reads_per_s: float
    recalls_per_s: float
    """Of a whole chunk's memories each."""
    tokens_per_s: float
    """Of all streams together."""
    streams: float | None
    """Of the speed that was said."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All of it."""

    model: str
    shape: ModelShape
    spec: MemorySpec
    codec: Mapping[str, Any]
    """Kind and options."""
    references: int
    memories: int
    """Of a chunk."""
    chunk_tokens: int
    memory: MemoryBytes
    bank: BankBytes
    tiers: tuple[Room, ...]
    cost: Cost
    reads: Reads | None
    """None: nothing was said of a drive."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values; FLOP are whole numbers."""
        ends = {"over_text": self.cost.over_text, "under_parameters": self.cost.under_parameters}
        return {
            **asdict(self),
            "spec": self.spec.to_json(),
            "cost": {**asdict(self.cost), **ends},
        }


def sized(config: "Config") -> "tuple[Config, ModelShape]":
    """The shape of the configured model, which is not loaded, and the configuration with the memories that it carries.

    Raises `ConfigError` if the shape cannot be told.
    """
    kind = load("adapters", config.model.adapter)
    if not isinstance(kind, Sizing):
        raise ConfigError(
            f"model.adapter: {config.model.adapter} does not tell the shape of a model; say it with --shape"
        )
    shape = kind.shape(config.model)
    return config.model_copy(update={"memory": kind.carried(config.model, config.memory)}), shape


def plan(config: "Config", shape: ModelShape, need: Need, name: str) -> Plan:
    """Plan for a model of this shape, called ``name``, and otherwise the configuration.

    Raises `ConfigError` for layers that the model does not have, and a codec that does not fit.
    """
    spec = memory_spec(
        config.memory,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=_computed_in(config, shape),
    )
    codec = codec_files.configured(config, spec)
    block = slot_bytes(codec)
    of_token = 2 * shape.layers * shape.head_dim * _HALF  # a key and a value of every layer
    memory = MemoryBytes(
        raw=of_token * shape.heads * spec.reference_tokens,
        cache=of_token * shape.kv_heads * spec.reference_tokens,
        kept=2 * spec.vectors_per_token * spec.tokens * spec.head_dim * _HALF,
        payload=codec.payload_bytes(spec.tokens),
        block=block,
    )
    n, recall = need.references, config.recall
    stored = (n * block, n * need.text_bytes, n * need.dim * _FLOAT)
    return Plan(
        model=name,
        shape=shape,
        spec=spec,
        codec={"kind": codec.kind, **codec.options},
        references=n,
        memories=recall.memories,
        chunk_tokens=recall.chunk_tokens,
        memory=memory,
        bank=BankBytes(*stored, total=sum(stored)),
        tiers=_rooms(config, need, block),
        cost=cost(shape, spec, chunk_tokens=recall.chunk_tokens, memories=recall.memories),
        reads=reads(need.drive, block, recall.memories, recall.chunk_tokens),
    )


def reads(drive: Drive, block: int, memories: int, chunk_tokens: int) -> Reads | None:
    """What a drive allows: a block of so many bytes is one request for whole pages, a chunk so many blocks."""
    size = -(-block // PAGE) * PAGE
    limits = {}
    if drive.bandwidth is not None:
        limits["bandwidth"] = drive.bandwidth / size
    if drive.iops is not None:
        limits["iops"] = float(drive.iops)
    if not limits:
        return None
    limit = min(limits, key=limits.__getitem__)
    recalls = limits[limit] / memories
    tokens = recalls * chunk_tokens
    return Reads(size, limit, limits[limit], recalls, tokens, None if drive.speed is None else tokens / drive.speed)


def _rooms(config: "Config", need: Need, block: int) -> tuple[Room, ...]:
    """Of the caching tiers that state a capacity, configured or default, and of those to be tried."""
    caching = (config.tiers or default_tiers(assembly.device(config)))[:-1]
    named = [(tier.kind, tier.options.get("capacity")) for tier in caching]
    named += [("--capacity", capacity) for capacity in need.capacities]
    found = []
    for tier, capacity in named:
        if isinstance(capacity, int):
            slots = capacity // block
            found.append(Room(tier, capacity, slots, min(1.0, slots / need.references)))
    return tuple(found)


def _computed_in(config: "Config", shape: ModelShape) -> str:
    """The dtype that ``model.dtype`` means on this machine."""
    if config.model.dtype != "auto":
        return config.model.dtype
    return "float32" if assembly.device(config).type == "cpu" else shape.dtype
