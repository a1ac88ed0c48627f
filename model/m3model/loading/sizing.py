"""The shape of a model of the transformers library, from its configuration alone: no weights are read or fetched."""

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from m3model import memory3
from m3model.attention.layout import AttentionLayout
from m3model.loading.models import first_line, quiet, source_of
from m3runtime.config.schema import ModelConfig
from m3runtime.errors import ConfigError
from m3runtime.memory.shape import ModelShape
from m3runtime.memory.spec import DTYPES

_GATED = {2: False, 3: True}
"""By how many matrices an MLP has."""


def shape_of(model: ModelConfig) -> ModelShape:
    """Read ``config.json``, or what a GGUF file begins with, and count the weights of a model that has no values.

    Raises `ConfigError` with one line for what is no causal language model with plain rotary keys and values, and for
    layers that are more than attention and one MLP, as mixtures of experts.
    """
    memory3.register()
    source = source_of(model.path)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(**source)
            stored = str(config.get_text_config().dtype).removeprefix("torch.")  # which making a model changes
            with torch.device("meta"):
                empty: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of many kinds: each file format's library raises its own
        raise ConfigError(
            f"model.path: cannot tell the shape of a causal language model from {model.path}: {first_line(error)}"
        ) from error
    layout, text = AttentionLayout.of(empty), empty.config.get_text_config()
    shape = ModelShape(
        layers=layout.layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        mlp=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        dtype=stored if stored in DTYPES else "float32",
    )
    layers = getattr(empty.get_decoder(), "layers", [])
    counts = {sum(weights.numel() for weights in layer.parameters() if weights.ndim > 1) for layer in layers}
    matrices = [(count - shape.attention_weights) / (shape.hidden * shape.mlp) for count in counts]
    if len(matrices) != 1 or matrices[0] not in _GATED:
        raise ConfigError(
            f"model.path: {model.path}: layers of a model of type {text.model_type} are not all attention and one MLP; "
            "say what the shape is with --shape"
        )
    return replace(shape, gated=_GATED[int(matrices[0])])
