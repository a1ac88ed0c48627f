"""What differs between versions of the transformers library."""

import inspect
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")
"""What forward passes call their cache: the first from 5.24 on, the second before."""


def cache_name(model: Any) -> str:
    """What this model's forward pass, and that of its layers, calls its cache."""
    parameters = inspect.signature(model.get_decoder().forward).parameters
    return next(name for name in CACHE_NAMES if name in parameters)
