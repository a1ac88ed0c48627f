"""`AttentionLayout`: what the adapter must know of a model's attention."""

from dataclasses import dataclass
from typing import Any

import torch

from m3runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Shape, dtype and device of the keys that a model keeps."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: Any) -> "AttentionLayout":
        """Read it off a causal language model of the transformers library.

        Raises `ConfigError` for architectures whose attention is not rotary self-attention with one cache of keys and
        values per layer, such as state-space or latent-attention models.
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
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        parameter = next(model.parameters())
        return cls(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            dtype=parameter.dtype,
            device=parameter.device,
        )
