"""`AttentionLayout`: the shape of a model's keys and values, and whether memories can be made of them.

Layers need not be alike. Gemma 4 has heads of another size, and fewer of them, in layers without a window. A memory is
one tensor all the same: the heads of a layer are cut into pieces of one size, and the layer with most of them says how
many there are; others are filled up with zeros. Where layers are alike, a piece is a head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3model.attention.rope import fixed_positions
from m3runtime.errors import ConfigError

Pair = tuple[Tensor, Tensor]
"""Keys and values, of one shape."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The KV heads of one layer."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers(self) -> int:
        """The numbers that one token's keys and values are."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one shape that all have memories, or all have none: their buffers are one tensor."""

    layers: list[int]
    shape: LayerShape
    places: list[int] | slice
    """Which of the memory layers they are; empty if they have no memories."""

    @property
    def remembers(self) -> bool:
        """Are they memory layers?"""
        return self.places != []


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Shape, dtype and device of the keys that a model keeps."""

    shapes: tuple[LayerShape, ...]
    """Of each layer that keeps keys and values. Further layers may read those of others, as Gemma 4's last ones do.

    A layer that runs several times (Dory) counts as several layers. Those of its later runs stand at the end.
    """
    dtype: torch.dtype
    device: torch.device
    positions: int | None = None
    """The number of positions within which keys can be read; None for any number. See `m3model.attention.rope`."""
    shares: bool = False
    """Are there layers that read other layers' keys?"""
    again: int = 0
    """The number of layers, at the end, that are later runs of earlier ones."""

    @classmethod
    def of(cls, model: Any) -> "AttentionLayout":
        """Read it off a causal language model of the transformers library.

        Raises `ConfigError`, with the reason, for architectures whose attention is not rotary self-attention with one
        cache of keys and values in each layer, such as state-space or latent-attention models.
        """
        config = model.config.get_text_config()
        if (reason := _reason(config, model)) is not None:
            raise ConfigError(f"a model of type {config.model_type} cannot read memories: {reason}")
        shared = getattr(config, "num_kv_shared_layers", None) or 0
        once = config.num_hidden_layers - shared
        again = (getattr(config, "n_recurrent_loops", 1) - 1) * getattr(config, "n_recurrent_layers", 0)
        parameter = next(model.parameters())
        return cls(
            shapes=tuple(_shape(config, layer) for layer in range(once + again)),
            dtype=parameter.dtype,
            device=parameter.device,
            positions=fixed_positions(config),
            shares=shared > 0,
            again=again,
        )

    @property
    def layers(self) -> int:
        """Layers that keep keys and values."""
        return len(self.shapes)

    @property
    def alike(self) -> bool:
        """Have all layers the same heads, and those keys and values of one size?"""
        first = self.shapes[0]
        return len(set(self.shapes)) == 1 and first.key_dim == first.value_dim

    @property
    def head_dim(self) -> int:
        """Numbers of a piece: what keys and values of all layers can be cut into."""
        return math.gcd(*(size for shape in self.shapes for size in (shape.key_dim, shape.value_dim)))

    @property
    def kv_heads(self) -> int:
        """Pieces of the layer with most of them; its KV heads where layers are alike."""
        return max(map(max, self.pieces))

    def last(self, layers: Sequence[int]) -> int | None:
        """The one of these layers that runs last; None if that may be any."""
        last = max(layers)
        return last if last < self.layers - self.again else None

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """By layer, how many pieces its keys are, and how many its values are."""
        dim = self.head_dim
        return [(s.kv_heads * s.key_dim // dim, s.kv_heads * s.value_dim // dim) for s in self.shapes]

    def groups(self, memory_layers: Sequence[int]) -> list[LayerGroup]:
        """All layers in groups, those with memories first."""
        place = {layer: at for at, layer in enumerate(memory_layers)}
        found: dict[tuple[bool, LayerShape], list[int]] = {}
        for layer in sorted(range(self.layers), key=lambda layer: layer not in place):
            found.setdefault((layer not in place, self.shapes[layer]), []).append(layer)
        return [
            # A slice, where it can be one: indexing by a list would copy.
            LayerGroup(layers, shape, [] if forgets else _places([place[layer] for layer in layers]))
            for (forgets, shape), layers in found.items()
        ]

    def packed(self, pair: Pair) -> Pair:
        """A layer's keys and values, ``[..., kv_heads, tokens, dim]`` of that layer, as memories have them.

        The result is ``[..., kv_heads, tokens, head_dim]`` of this layout.
        """
        return self.pack(pair[0]), self.pack(pair[1])

    def unpacked(self, pair: Pair, shape: LayerShape) -> Pair:
        """`packed` undone, for one layer or several of one shape. Without a copy where layers are alike."""
        keys, values = pair
        return unpack(keys, shape.kv_heads, shape.key_dim), unpack(values, shape.kv_heads, shape.value_dim)

    def of_group(self, pair: Pair, group: LayerGroup) -> Pair:
        """What a memory, ``[memory layers, kv_heads, tokens, head_dim]``, has for a group's layers, unpacked."""
        return self.unpacked((pair[0][group.places], pair[1][group.places]), group.shape)

    def heads_of_pieces(self, memory_layers: Sequence[int]) -> Pair:
        """The KV head that each piece of keys, and of values, is a part of.

        ``int64[memory layers, kv_heads]`` on the CPU, of no meaning for pieces that are filled up.
        """
        shapes = [self.shapes[layer] for layer in memory_layers]
        pieces = torch.arange(self.kv_heads)
        keys, values = (
            torch.stack([(pieces // (dim // self.head_dim)).clamp_max(shape.kv_heads - 1) for shape, dim in each])
            for each in (
                [(shape, shape.key_dim) for shape in shapes],
                [(shape, shape.value_dim) for shape in shapes],
            )
        )
        return keys, values

    def pack(self, x: Tensor) -> Tensor:
        """`packed` for keys or values alone."""
        heads, tokens, dim = x.shape[-3:]
        if (heads, dim) == (self.kv_heads, self.head_dim):
            return x
        pieces = torch.unflatten(x, -1, (-1, self.head_dim)).movedim(-2, -3).flatten(-4, -3)
        padded = x.new_zeros(*x.shape[:-3], self.kv_heads, tokens, self.head_dim)
        padded[..., : pieces.shape[-3], :, :] = pieces
        return padded


def _places(places: list[int]) -> list[int] | slice:
    """Consecutive places as a slice."""
    first, end = places[0], places[-1] + 1
    return slice(first, end) if places == list(range(first, end)) else places


def unpack(x: Tensor, heads: int, dim: int) -> Tensor:
    """`AttentionLayout.pack` undone, for a layer of so many KV heads of this size."""
    if (heads, dim) == (x.shape[-3], x.shape[-1]):
        return x
    pieces = dim // x.shape[-1]
    return torch.unflatten(x[..., : heads * pieces, :, :], -3, (heads, pieces)).movedim(-3, -2).flatten(-2)


def _configs(config: Any) -> list[Any]:
    """The configuration of each layer, or the one of all."""
    if not getattr(config, "is_heterogeneous", False):
        return [config]
    return [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]


def _shape(config: Any, layer: int) -> LayerShape:
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[layer]
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "mimo_v2_flash" and config.layer_types[layer] == "sliding_attention":
        kv_heads *= 2  # says its code alone
    return LayerShape(kv_heads, head_dim, getattr(config, "v_head_dim", None) or head_dim)


_REASONS = {
    "doge": "each layer weighs and hides keys by their values, in masks of its own",
    "minimax": "it takes no cache but its own",
}
"""Reasons that the code of a type of models alone says."""


def _reason(config: Any, model: Any) -> str | None:
    """Why no memories can be made of a model's keys and values; None if they can."""
    if any(getattr(one, "kv_lora_rank", None) for one in _configs(config)):
        return "its attention is latent: it keeps no keys and values of heads"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of the kind {sorted(kinds)[0]} keep no keys and values of all tokens"
    if not getattr(config, "rope_parameters", None):
        return "its positions are not rotary, or it has no attention"
    if getattr(config, "global_head_dim", None) and not getattr(config, "is_heterogeneous", False):
        return "this version of the transformers library does not tell the shape of each layer: install a newer one"
    if getattr(config, "recurrent_kv_cache_mode", "per_loop") != "per_loop":
        return "a layer that runs several times keeps the keys of the last time alone"
    if not model._supports_attention_backend:
        return "the transformers library does not let its attention be replaced"
    return _REASONS.get(config.model_type)
