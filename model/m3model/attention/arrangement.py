"""`Arrangement`: where memories stand while they are read, where that is not where they were computed.

Memories are computed and kept for parallel positions, with one sink before all of them (Memory³, sections 3.1, 3.2).
The other arrangements are made of those when a stream reads them, so that a bank serves all.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from m3model.attention.layout import AttentionLayout, Pair, unpack
from m3runtime.config.schema import MemoryConfig
from m3runtime.errors import ConfigError


class Arrangement:
    """Arranges the memories of one sequence. Thread-safe."""

    def __init__(
        self, model: Any, layout: AttentionLayout, memory: MemoryConfig, layers: Sequence[int], sink: Pair
    ) -> None:
        """``layers`` are the memory layers, and ``sink`` is of all layers.

        Memories and sink are ``[layers, kv_heads, tokens, head_dim]``. Raises `ConfigError` for a model whose keys
        cannot be moved to other positions.
        """
        self._layers = tuple(layers)
        self._layout = layout
        self._width = memory.reference_tokens  # of the interval of positions that a memory was computed in
        chosen = list(self._layers)
        self._sink = (sink[0][chosen], sink[1][chosen]) if memory.sinks == "each" else None
        self._rotate = _rotation(model) if memory.positions == "sequential" else None
        self._model = model

    def __call__(self, memories: Sequence[Pair]) -> list[Pair]:
        """Memories, best first, as attention is to read them.

        In sequence, the best one stays next to the context and each further one stands an interval before the last,
        at positions that may be negative: only distances matter to rotary positions.
        """
        arranged = list(memories)
        if self._sink is not None:
            of_keys, of_values = (x.to(memories[0][0].dtype) if memories else x for x in self._sink)
            arranged = [
                (torch.cat([of_keys, keys], dim=2), torch.cat([of_values, values], dim=2)) for keys, values in arranged
            ]
        if self._rotate is not None:
            arranged = [
                (self.moved(keys, -place * self._width), values) for place, (keys, values) in enumerate(arranged)
            ]
        return arranged

    def moved(self, keys: Tensor, by: int) -> Tensor:
        """Keys as they would be so many positions further on."""
        if not by:
            return keys
        assert self._rotate is not None
        turned = []
        for one, layer in zip(keys, self._layers, strict=True):
            shape = self._layout.shapes[layer]
            turned.append(self._layout.pack(self._rotate(unpack(one, shape.kv_heads, shape.key_dim), layer, by)))
        return torch.stack(turned)


def _rotation(model: Any) -> Callable[[Tensor, int, int], Tensor]:
    """A function that rotates one layer's keys, ``[kv_heads, tokens, head_dim]``, on by a number of positions.

    It is the model's own: families differ in which dimensions they rotate, by what, and in which layers.
    """
    decoder = model.get_decoder()
    apply: Any = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
    embed: Any = getattr(decoder, "rotary_emb", None)
    config = model.config.get_text_config()
    again = getattr(config, "n_recurrent_loops", 1) > 1
    if apply is None or embed is None or again or getattr(config, "no_rope_layers", None):
        raise ConfigError(
            f"memory.positions must be parallel: the keys of a model of type {config.model_type} cannot be moved"
        )
    alone = next(iter(inspect.signature(apply).parameters)) == "x"  # of Gemma 3n and 4: not queries and keys at once
    # Gemma 3 has other frequencies in layers with a sliding window.
    kinds = config.layer_types if hasattr(embed, "full_attention_inv_freq") else None

    @torch.inference_mode()
    def rotate(keys: Tensor, layer: int, by: int) -> Tensor:
        at = torch.tensor([[by]], device=keys.device)
        cos, sin = embed(keys.float(), at, kinds[layer]) if kinds else embed(keys.float(), at)
        scale = (cos.square() + sin.square()).sqrt()  # YaRN's, which is in the keys already
        x = keys[None].float()
        cos, sin = cos / scale, sin / scale
        turned: Tensor = apply(x, cos, sin) if alone else apply(x, x, cos, sin)[1]
        return turned[0].to(keys.dtype)

    return rotate
