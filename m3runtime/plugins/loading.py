"""Finds plug-ins: classes by the name of their entry point or by import path."""

from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

from m3runtime.errors import PluginError

_GROUPS = {
    "tiers": "tier",
    "codecs": "codec",
    "indexes": "index",
    "embedders": "embedder",
    "rerankers": "reranker",
    "adapters": "adapter",
    "trainers": "trainer",
    "pools": "pool",
}
_EXTRAS = {
    "faiss": ("train",),
    "transformers": ("transformers", "memory3"),
    "accelerate": ("transformers", "memory3"),
    "gguf": ("transformers",),
    "sentence_transformers": ("sentence-transformers",),
    "FlagEmbedding": ("bge",),
    "matplotlib": ("eval",),
    "rapidfuzz": ("eval", "memory3"),
    "scipy": ("eval",),
    "tensorboard": ("memory3",),
    "pypdf": ("documents",),
    "docx": ("documents",),
    "pptx": ("documents",),
    "openpyxl": ("documents",),
    "pyarrow": ("parquet",),
    "lance": ("lance",),
    "ray": ("ray",),
    "watchfiles": ("sync",),
    "valkey": ("valkey",),
    "langchain_core": ("langchain",),
    "llama_index": ("llama-index",),
    "vllm": ("vllm",),
    "httpx": ("vllm-url",),
}
"""The extras that install each optional module."""


def load(group: str, name: str) -> type[Any]:
    """The class that a plug-in's name, or an import path ``package.module:Name``, stands for.

    ``group`` is a group of entry points, such as ``tiers``. Raises `PluginError` if the name is not known, or its
    module cannot be imported.
    """
    what = f"{_GROUPS[group]} {name}"
    module, _, attribute = name.partition(":") if ":" in name else _find(group, name)
    if not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        raise PluginError(f"{what} is not an import path such as package.module:Name")
    found = import_for(what, module)
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise PluginError(f"{what}: module {module} has no {attribute}") from None
    if not isinstance(found, type):
        raise PluginError(f"{what}: {module}:{attribute} is not a class")
    return found


def available(group: str) -> list[str]:
    """The names of the installed plug-ins of a group, sorted."""
    return sorted({entry.name for entry in _entries(group)})


def require(what: str, extra: str) -> None:
    """Raise `PluginError`, with what to install, unless every module of an extra is installed. Imports none."""
    for module, extras in _EXTRAS.items():
        if extra in extras and not _is_installed(module):
            raise PluginError(f"{what} needs {module}: pip install 'm3runtime[{extra}]'")


def import_for(what: str, module: str) -> Any:
    """The module that something needs. Raises `PluginError`, with what to install, if it cannot be imported."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in _EXTRAS:
            raise PluginError(f"{what} needs {missing}: pip install 'm3runtime[{_EXTRAS[missing][0]}]'") from error
        if missing == module.partition(".")[0]:
            raise PluginError(f"{what}: no module {error.name}; is its folder on PYTHONPATH?") from error
        raise PluginError(f"{what} needs {missing}, which is not installed") from error
    except ImportError as error:
        raise PluginError(f"{what} cannot be imported: {' '.join(str(error).split())}") from error


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # from an import hook that blocks it
        return False


@cache
def _entries(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=f"m3runtime.{group}"))


def _find(group: str, name: str) -> tuple[str, str, str]:
    """The module, a colon and the attribute of the entry point with that name."""
    values = sorted({f"{entry.module}:{entry.attr}" for entry in _entries(group) if entry.name == name})
    if len(values) > 1:
        raise PluginError(f"{_GROUPS[group]} {name} is provided twice; use an import path: {' or '.join(values)}")
    if values:
        return values[0].partition(":")
    choices = available(group)
    if not choices:
        raise PluginError(f"no {_GROUPS[group]} is installed, so not even m3runtime's own: pip install m3runtime")
    near = get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise PluginError(
        f"{_GROUPS[group]} {name} is not known; {hint}"
        f"There are {', '.join(choices)}, and import paths package.module:Name"
    )
