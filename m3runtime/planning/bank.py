"""`plan`: the size and the cost of a bank, the share of it that tiers hold, and the reads that a drive allows.

Everything is computed from sizes. Nothing is loaded, written or timed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank.codecs import slot_bytes
from m3runtime.config.units import parse_size
from m3runtime.errors import ConfigError
from m3runtime.memory.shape import ModelShape, memory_spec
from m3runtime.memory.spec import MemorySpec
from m3runtime.planning.cost import Cost, cost
from m3runtime.planning.drive import Drive, Reads, reads
from m3runtime.planning.store import Prices, StoreCost, store_cost
from m3runtime.planning.workers import Work, Workers, work
from m3runtime.plugins.loading import load
from m3runtime.retrieval.embedder import Embedder
from m3runtime.storage.defaults import default_tiers
from m3runtime.writing import codec_files
from m3runtime.writing.reencoding import starter

if TYPE_CHECKING:
    from m3runtime.config.schema import Config

_BFLOAT16 = 2
"""Bytes of a bfloat16."""
_FLOAT32 = 4
"""Bytes of a float32: homes store embeddings as such."""


@dataclass(frozen=True, slots=True)
class Need:
    """The bank and the hardware to plan for."""

    references: int
    """Number of references. Each is taken to have ``memory.reference_tokens`` tokens."""
    text_bytes: int
    """Bytes of the text of one reference."""
    dim: int
    """Dimensions of an embedding."""
    capacities: tuple[int, ...] = ()
    """Capacities in bytes of further tiers, in addition to the configured ones."""
    drive: Drive = field(default_factory=Drive)
    workers: Workers = field(default_factory=Workers)
    prices: Prices = field(default_factory=Prices)
    """For a home in an object store."""


@dataclass(frozen=True, slots=True)
class MemoryBytes:
    """The size of the memory of one full reference in bytes, after each step."""

    raw: int
    """Every layer, token and query head in bfloat16. The paper counts so, as if no heads shared keys and values."""
    cache: int
    """Every layer, token and KV head in bfloat16: the size of the model's own KV cache of the reference."""
    kept: int
    """The layers, KV heads and tokens of the spec in bfloat16."""
    payload: int
    """The encoded memory; an upper bound for a codec that is not trained yet."""
    block: int
    """The payload with its header, as every tier holds it."""


@dataclass(frozen=True, slots=True)
class BankBytes:
    """The size of a bank in bytes, without the internal structures of its home and the index."""

    blocks: int
    texts: int
    embeddings: int
    codec: int
    """Bytes of the trained codec; about the most that it can take if it is not trained yet."""
    total: int


@dataclass(frozen=True, slots=True)
class Room:
    """The number of memories that a caching tier holds, in whole slots."""

    tier: str
    capacity: int
    memories: int
    share: float
    """The share of the bank, at most 1."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The result of `plan`."""

    model: str
    shape: ModelShape
    spec: MemorySpec
    codec: Mapping[str, Any]
    """Kind and options of the codec."""
    references: int
    beginning: int
    """References whose blocks are in int8: all of a bank that is too small to train its codec on, or none."""
    beginning_block: int
    """Bytes of a block in int8."""
    memories: int
    """Memories of each chunk."""
    chunk_tokens: int
    memory: MemoryBytes
    bank: BankBytes
    tiers: tuple[Room, ...]
    cost: Cost
    reads: Reads | None
    """None if the limits of the drive are not known."""
    work: Work
    store: StoreCost | None
    """None if the configured home is not in an object store."""

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values, unrounded."""
        ends = {"over_text": self.cost.over_text, "under_parameters": self.cost.under_parameters}
        return {
            **asdict(self),
            "spec": self.spec.to_json(),
            "cost": {**asdict(self.cost), **ends},
        }


def sized(config: "Config") -> "tuple[Config, ModelShape]":
    """The configuration with the model's own memory settings, and the shape of the model, which is not loaded.

    Raises `ConfigError` if the adapter cannot tell the shape.
    """
    kind: type[Adapter] = load("adapters", config.model.adapter)
    shape = kind.shape(config.model)
    return config.model_copy(update={"memory": kind.carried(config.model, config.memory)}), shape


def embedding_dim(config: "Config") -> int | None:
    """The dimensions of the configured embedder, which is not loaded; None if its model is not on this machine."""
    kind: type[Embedder] = load("embedders", config.embedder.kind)
    return kind.dim_of(config.embedder.path, config.embedder.options)


def plan(config: "Config", shape: ModelShape, need: Need, name: str) -> Plan:
    """Plan a bank of a model of this shape, called ``name``, with the memory, codec and tiers of the configuration.

    Raises `ConfigError` if a memory layer is not in the model, or the codec does not fit the memories.
    """
    spec = memory_spec(
        config.memory,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=_computed_in(config, shape),
    )
    codec = codec_files.configured(config, spec)
    block, first = slot_bytes(codec), slot_bytes(starter(spec))
    sampled = 0 if codec.trained else -(-config.codec.sample_tokens // spec.tokens)
    of_token = 2 * shape.layers * shape.head_dim * _BFLOAT16  # a key and a value of every layer
    memory = MemoryBytes(
        raw=of_token * shape.heads * spec.reference_tokens,
        cache=of_token * shape.kv_heads * spec.reference_tokens,
        kept=spec.numbers(spec.tokens) * _BFLOAT16,
        payload=codec.payload_bytes(spec.tokens),
        block=block,
    )
    n, recall = need.references, config.recall
    beginning = n if n < sampled else 0
    blocks = beginning * first + (n - beginning) * block
    stored = (blocks, n * need.text_bytes, n * need.dim * _FLOAT32, 0 if beginning else codec.learned_bytes())
    costs = cost(shape, spec, chunk_tokens=recall.chunk_tokens, memories=recall.memories)
    return Plan(
        model=name,
        shape=shape,
        spec=spec,
        codec={"kind": codec.kind, **codec.options},
        references=n,
        beginning=beginning,
        beginning_block=first,
        memories=recall.memories,
        chunk_tokens=recall.chunk_tokens,
        memory=memory,
        bank=BankBytes(*stored, total=sum(stored)),
        tiers=_rooms(config, need, block),
        cost=costs,
        reads=reads(need.drive, block, recall.memories, recall.chunk_tokens),
        work=work(need.workers, n, costs.write * n),
        store=store_cost(need.prices, references=n, stored=sum(stored), memories=recall.memories)
        if _is_in_store(config)
        else None,
    )


def _is_in_store(config: "Config") -> bool:
    """Is the configured home in an object store?"""
    return bool(config.tiers) and "://" in str(config.tiers[-1].options.get("url", ""))


def _rooms(config: "Config", need: Need, block: int) -> tuple[Room, ...]:
    """The caching tiers that state a capacity, configured or default, and those of `Need.capacities`."""
    caching = (config.tiers or default_tiers(assembly.device(config)))[:-1]
    named = []
    for place, tier in enumerate(caching):
        if tier.options.get("capacity") is not None:
            try:
                named.append((tier.kind, parse_size(tier.options["capacity"])))
            except ValueError as error:
                raise ConfigError(f"tiers.{place}.capacity {error}") from None
    named += [("--capacity", capacity) for capacity in need.capacities]
    return tuple(Room(tier, size, size // block, min(1.0, size // block / need.references)) for tier, size in named)


def _computed_in(config: "Config", shape: ModelShape) -> str:
    """The name of the dtype that ``model.dtype`` selects on this machine."""
    if config.model.dtype != "auto":
        return config.model.dtype
    return "float32" if assembly.device(config).type == "cpu" else shape.dtype
