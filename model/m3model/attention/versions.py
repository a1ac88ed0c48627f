"""Differences between versions of the transformers library."""

import inspect
from typing import Any

from m3runtime.errors import ConfigError

CACHE_NAMES = ("cache", "past_key_values")
"""The names of a forward pass' cache: the first from 5.24 on, the second before."""


def cache_name(model: Any) -> str:
    """The argument by which this model's forward pass, and that of its layers, takes its cache.

    Raises `ConfigError` for a model that takes none.
    """
    parameters = inspect.signature(model.get_decoder().forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise ConfigError(f"a model of type {model.config.model_type} takes no cache: it cannot read memories")
