"""Explicit memory for language models, stored in tiers and recalled while a model decodes.

    from m3runtime import Runtime

    with Runtime.open("m3.yaml") as runtime:
        stream = runtime.stream()
        memories = stream.recall("the last 64 tokens, as text")

``import m3runtime`` is light: it loads neither torch nor a backend. Each public name is loaded at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3runtime.config.schema import Config
    from m3runtime.errors import M3Error
    from m3runtime.memory.spec import MemorySpec
    from m3runtime.memory.tensors import MemoryTensors
    from m3runtime.recall.recalled import Recalled
    from m3runtime.runtime import Runtime
    from m3runtime.stream import Stream

__all__ = ["Config", "M3Error", "MemorySpec", "MemoryTensors", "Recalled", "Runtime", "Stream", "__version__"]

__version__ = "0.1.0"

_MODULES = {
    "Config": "m3runtime.config.schema",
    "M3Error": "m3runtime.errors",
    "MemorySpec": "m3runtime.memory.spec",
    "Recalled": "m3runtime.recall.recalled",
    "MemoryTensors": "m3runtime.memory.tensors",
    "Runtime": "m3runtime.runtime",
    "Stream": "m3runtime.stream",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
