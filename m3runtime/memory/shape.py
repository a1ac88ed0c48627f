"""`ModelShape`: the sizes of a model that decide what its memories weigh and cost, without the model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from m3runtime.config.units import parse_count
from m3runtime.errors import ConfigError
from m3runtime.memory.spec import DTYPES, MemorySpec
from m3runtime.plugins.messages import not_known

if TYPE_CHECKING:
    from m3runtime.config.schema import MemoryConfig


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder whose layers are all alike: attention, then an MLP, as Llama's. Raises `ConfigError`."""

    layers: int
    hidden: int
    """Channels between layers."""
    heads: int
    """Query heads of each layer."""
    kv_heads: int
    head_dim: int
    mlp: int
    """Width of the MLP."""
    vocabulary: int
    gated: bool = True
    """True if the MLP has three matrices, as Llama's; else it has two."""
    dtype: str = "bfloat16"
    """Dtype of the stored weights."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is int and value < 1:
                raise ConfigError(f"a model's {name} must be at least 1, not {value}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"a model's kv_heads ({self.kv_heads}) must divide its heads ({self.heads})")
        if self.dtype not in DTYPES:
            raise ConfigError(f"a model's dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")

    @property
    def attention_weights(self) -> int:
        """Weights of the projections of queries, keys, values and outputs of one layer."""
        queries, pairs = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * self.hidden * queries + 2 * self.hidden * pairs

    @property
    def mlp_weights(self) -> int:
        """Weights of the MLP of one layer."""
        return (3 if self.gated else 2) * self.hidden * self.mlp


MODELS = {
    # Memory³, section 3; its weights were never published.
    "memory3-2.4b": ModelShape(
        layers=44, hidden=3200, heads=40, kv_heads=8, head_dim=80, mlp=3200, vocabulary=60_299, gated=True
    )
}
"""Shapes by name."""


def memory_layers(memory: "MemoryConfig", count: int) -> tuple[int, ...]:
    """The memory layers that ``memory.layers`` names, of a model with ``count`` layers. Raises `ConfigError`."""
    wanted = memory.layers
    if wanted == "all":
        return tuple(range(count))
    if wanted == "first-half":
        return tuple(range(count // 2))
    if wanted == "middle-half":
        return tuple(range(count // 4, count // 4 + count // 2))
    chosen = tuple(sorted(set(wanted)))
    if not chosen or chosen[-1] >= count or chosen[0] < 0:
        raise ConfigError(f"memory.layers: the model has layers 0 to {count - 1}, not {list(chosen)}")
    return chosen


def kept_tokens(memory: "MemoryConfig") -> int:
    """The most tokens of a memory that ``memory.tokens_per_head`` allows in any head."""
    kept = memory.tokens_per_head
    if kept == "all":
        return memory.reference_tokens
    return min(kept if isinstance(kept, int) else max(map(max, kept)), memory.reference_tokens)


def _budgets(memory: "MemoryConfig", layers: int, kv_heads: int) -> tuple[tuple[int, ...], ...]:
    """The budgets of a spec. Raises `ConfigError` unless they are of so many memory layers and heads."""
    if not isinstance(memory.tokens_per_head, tuple):
        return ()
    if len(memory.tokens_per_head) != layers or any(len(layer) != kv_heads for layer in memory.tokens_per_head):
        found = f"{len(memory.tokens_per_head)} lists of {len(memory.tokens_per_head[0])}"
        raise ConfigError(
            f"memory.tokens_per_head: the model has {layers} memory layers of {kv_heads} KV heads, not {found}"
        )
    most = kept_tokens(memory)
    capped = tuple(tuple(min(one, most) for one in layer) for layer in memory.tokens_per_head)
    return () if min(map(min, capped)) == most else capped


def memory_spec(
    memory: "MemoryConfig",
    *,
    layers: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    heads: Sequence[tuple[int, int]] = (),
) -> MemorySpec:
    """The spec of a model's memories. Raises `ConfigError` for layers that the model does not have.

    ``heads`` are those of `MemorySpec`, of all layers of the model; if all have ``kv_heads``, it may say so.
    """
    chosen = memory_layers(memory, layers)
    own = tuple(heads[layer] for layer in chosen) if heads else ()
    return MemorySpec(
        layers=chosen,
        kv_heads=kv_heads,
        tokens=kept_tokens(memory),
        head_dim=head_dim,
        reference_tokens=memory.reference_tokens,
        dtype=dtype,
        heads=own if any(pair != (kv_heads, kv_heads) for pair in own) else (),
        budgets=_budgets(memory, len(chosen), kv_heads),
    )


def described(text: str, base: ModelShape | None = None) -> ModelShape:
    """The shape of a text such as ``layers=30,hidden=576,heads=9,kv_heads=3,mlp=1536,vocabulary=49152,gated=true``.

    What is left out is as in ``base``. Without one, ``kv_heads`` are the ``heads``, ``head_dim`` is
    ``hidden / heads``, the MLP is gated and weights are bfloat16; the others are needed. Raises `ConfigError` with one
    line that names the part.
    """
    found: dict[str, Any] = {} if base is None else asdict(base)
    known = [field.name for field in fields(ModelShape)]
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ConfigError(f"{part}: write it as NAME=VALUE, such as layers=30")
        if name not in known:
            raise ConfigError(not_known("", name, known))
        found[name] = _value(name, value)
    if missing := [name for name in ("layers", "hidden", "heads", "mlp", "vocabulary") if name not in found]:
        raise ConfigError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    found.setdefault("kv_heads", found["heads"])
    if "head_dim" not in found and found["hidden"] % found["heads"]:
        raise ConfigError(f"heads ({found['heads']}) do not divide hidden ({found['hidden']}); give head_dim too")
    found.setdefault("head_dim", found["hidden"] // found["heads"])
    return ModelShape(**found)


def _value(name: str, text: str) -> int | str | bool:
    if name == "dtype":
        return text
    if name == "gated":
        if text not in ("true", "false"):
            raise ConfigError(f"gated must be true or false, not {text!r}")
        return text == "true"
    try:
        return parse_count(text)
    except ValueError as error:
        raise ConfigError(f"{name} {error}") from None
