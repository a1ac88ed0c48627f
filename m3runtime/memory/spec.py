"""`MemorySpec`: the shape of every memory in a bank."""

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import xxhash
from pydantic import ConfigDict

from m3runtime.errors import ConfigError
from m3runtime.plugins.messages import difference

DTYPES = ("float32", "float16", "bfloat16")
_BY_LAYER = ("heads", "budgets")


@dataclass(frozen=True, slots=True)
class MemorySpec:
    """The part of a model's attention that is kept, and its size.

    One memory has keys and values of shape ``[layers, kv_heads, tokens, head_dim]``
    (Memory³, section 3.3; the paper's own is 22 x 8 x 8 x 80). ``tokens == reference_tokens`` is a *dense*
    memory: it has as many tokens as its reference, so ``tokens`` is then the most a memory may have.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")  # in a manifest, say

    layers: tuple[int, ...]
    """Indices of the memory layers, ascending."""
    kv_heads: int
    """KV heads of each memory layer."""
    tokens: int
    """Most tokens kept per KV head."""
    head_dim: int
    reference_tokens: int
    """Most tokens of a reference; also the width of the interval of positions that memories share."""
    dtype: str
    """Dtype in which the model computed the memories: ``float32``, ``float16`` or ``bfloat16``."""
    heads: tuple[tuple[int, int], ...] = ()
    """By memory layer, how many of its ``kv_heads`` have keys, and how many have values; empty if all have both.

    The first ones do. What the others hold is zero, and codecs need not store it.
    """
    budgets: tuple[tuple[int, ...], ...] = ()
    """By memory layer, the most tokens that each KV head keeps; empty if all keep ``tokens``, which is the largest.

    A head of a memory of ``n`` tokens has the first ``min(n, budget)``. What lies beyond is not stored, and not read.
    """

    def __post_init__(self) -> None:
        if not self.layers or any(b <= a for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise ConfigError(f"memory layers must be ascending and not empty: {self.layers}")
        if self.layers[0] < 0:
            raise ConfigError(f"memory layers must not be negative: {self.layers}")
        if min(self.kv_heads, self.tokens, self.head_dim) < 1:
            raise ConfigError("kv_heads, tokens and head_dim must be at least 1")
        if not self.tokens <= self.reference_tokens <= 65_535:
            raise ConfigError(
                f"tokens ({self.tokens}) must not exceed reference_tokens ({self.reference_tokens}), "
                "which must not exceed 65535"
            )
        if self.heads and (
            len(self.heads) != len(self.layers)
            or not all(1 <= count <= self.kv_heads for pair in self.heads for count in pair)
            or all(count == self.kv_heads for pair in self.heads for count in pair)
        ):
            raise ConfigError(f"heads must be those of {len(self.layers)} layers that have at most {self.kv_heads}")
        if self.budgets:
            self._check_budgets()
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")

    def _check_budgets(self) -> None:
        every = [budget for layer in self.budgets for budget in layer]
        if len(self.budgets) != len(self.layers) or any(len(layer) != self.kv_heads for layer in self.budgets):
            raise ConfigError(f"budgets must be those of {len(self.layers)} layers of {self.kv_heads} KV heads")
        if min(every) < 1 or max(every) != self.tokens or min(every) == self.tokens:
            raise ConfigError(f"budgets must differ, from 1 to {self.tokens} tokens, which one head at least keeps")
        if self.heads:
            raise ConfigError("budgets need layers that all have the same heads")

    @property
    def dense(self) -> bool:
        """True if a memory keeps every token of its reference, in every head."""
        return self.tokens == self.reference_tokens and not self.budgets

    @property
    def vectors_per_token(self) -> int:
        """Key vectors (and as many value vectors) that one token has room for: layers x KV heads."""
        return len(self.layers) * self.kv_heads

    @property
    def places(self) -> tuple[list[int], list[int]]:
        """The places of the key vectors, and of the value vectors, that one token has, among layers x KV heads."""
        heads = self.heads or ((self.kv_heads, self.kv_heads),) * len(self.layers)
        firsts = range(0, self.vectors_per_token, self.kv_heads)
        keys, values = zip(*heads, strict=True)
        of_keys = [first + head for first, count in zip(firsts, keys, strict=True) for head in range(count)]
        return of_keys, [first + head for first, count in zip(firsts, values, strict=True) for head in range(count)]

    @property
    def numbers_per_token(self) -> int:
        """The numbers that the keys and values of one token are."""
        vectors = sum(map(sum, self.heads)) if self.heads else 2 * self.vectors_per_token
        return vectors * self.head_dim

    def numbers(self, tokens: int) -> int:
        """The numbers that the keys and values of a memory of so many tokens are."""
        if not self.budgets:
            return tokens * self.numbers_per_token
        return 2 * self.head_dim * sum(min(tokens, budget) for layer in self.budgets for budget in layer)

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON values; `from_json` reads it back. Empty ``heads`` and ``budgets`` are left out."""
        lists = {name: [list(layer) for layer in getattr(self, name)] for name in _BY_LAYER}
        stated = {**asdict(self), "layers": list(self.layers), **lists}
        return {name: value for name, value in stated.items() if name not in _BY_LAYER or value}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "MemorySpec":
        """Read what `to_json` wrote. Raises `ConfigError` if it does not describe a spec."""
        try:
            sizes = ("kv_heads", "tokens", "head_dim", "reference_tokens")
            heads = tuple((keys, values) for keys, values in value.get("heads", ()))
            budgets = tuple(map(tuple, value.get("budgets", ())))
            by_layer = [count for layer in (*heads, *budgets) for count in layer]
            numbers = [*value["layers"], *(value[name] for name in sizes), *by_layer]
            if any(type(number) is not int for number in numbers):
                raise ConfigError(f"not a memory spec: not all whole numbers: {str(numbers)[:200]}")
            return cls(**{**value, "layers": tuple(value["layers"]), "heads": heads, "budgets": budgets})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a memory spec: {error}") from error

    def difference(self, other: "MemorySpec") -> str:
        """The difference of two specs, for an error message; empty for equal ones."""
        return difference(*({**one.to_json(), **one._in_short()} for one in (self, other)))

    def _in_short(self) -> dict[str, str]:
        """The budgets, which are as many as heads, as their mean and as letters that tell them from others."""
        if not self.budgets:
            return {}
        mean = self.numbers(self.tokens) / self.numbers_per_token
        return {"budgets": f"of {mean:.1f} tokens on average ({fingerprint([*map(list, self.budgets)])[:8]})"}


def canonical_json(value: Any) -> str:
    """JSON with one spelling for equal values: sorted keys, no white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """Thirty-two hex digits (XXH3-128) that stand for a JSON value."""
    return xxhash.xxh3_128_hexdigest(canonical_json(value).encode())
