"""`AttentionLayout`: the shape of a model's keys and values, and whether memories can be made of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3model.attention.rope import fixed_positions
from m3runtime.errors import ConfigError

Pair = tuple[Tensor, Tensor]
"""Keys and values, of one shape."""


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Shape, dtype and device of the keys that a model keeps."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    positions: int | None = None
    """The number of positions within which keys can be read; None for any number. See `m3model.attention.rope`."""

    @classmethod
    def of(cls, model: Any) -> "AttentionLayout":
        """Read it off a causal language model of the transformers library.

        Raises `ConfigError` for architectures whose attention is not rotary self-attention with one cache of keys and
        values per layer, alike in all layers, such as state-space or latent-attention models.
        """
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        plain = kinds <= {"full_attention", "sliding_attention"} and not getattr(config, "kv_lora_rank", None)
        rotary = bool(getattr(config, "rope_parameters", None))
        if not (plain and rotary and model._supports_attention_backend):
            raise ConfigError(
                f"a model of type {config.model_type} keeps no plain rotary keys and values in each layer"
            )
        heads = config.num_attention_heads
        head_dim = _alike(config, "head_dim") or config.hidden_size // heads
        if _alike(config, "v_head_dim") not in (None, head_dim) or _alike(config, "num_kv_shared_layers"):
            raise ConfigError(f"keys and values of a model of type {config.model_type} are not alike in all layers")
        parameter = next(model.parameters())
        return cls(
            layers=config.num_hidden_layers,
            kv_heads=_alike(config, "num_key_value_heads") or heads,
            head_dim=head_dim,
            dtype=parameter.dtype,
            device=parameter.device,
            positions=fixed_positions(config),
        )


def _alike(config: Any, name: str) -> int | None:
    """A setting that all layers share, or None. Raises `ConfigError` if it may vary from layer to layer (Gemma 4)."""
    try:
        value: int | None = getattr(config, name, None)
    except RuntimeError as error:
        raise ConfigError(f"{name} of a model of type {config.model_type} varies from layer to layer") from error
    return value
