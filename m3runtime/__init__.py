"""Explicit memories for language models: stored in tiers, recalled while a model decodes.

``import m3runtime`` is light: it loads neither torch nor a backend. The public names below are loaded on
first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3runtime.config.schema import Config
    from m3runtime.errors import M3Error
    from m3runtime.memory.spec import MemorySpec
    from m3runtime.memory.tensors import MemoryTensors
    from m3runtime.runtime import Runtime
    from m3runtime.stream import Recalled, Stream

__all__ = ["Config", "M3Error", "MemorySpec", "MemoryTensors", "Recalled", "Runtime", "Stream", "__version__"]

__version__ = "0.1.0"

_HOMES = {
    "Config": "m3runtime.config.schema",
    "M3Error": "m3runtime.errors",
    "MemorySpec": "m3runtime.memory.spec",
    "MemoryTensors": "m3runtime.memory.tensors",
    "Recalled": "m3runtime.stream",
    "Runtime": "m3runtime.runtime",
    "Stream": "m3runtime.stream",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
