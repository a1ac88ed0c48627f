"""Presets: defaults that belong together, by one word in the configuration. What is said goes before them."""

from collections.abc import Mapping
from typing import Any

Key = tuple[str, str]

ORIGIN = "memory.preset"
"""Where a value comes from that a preset gave."""

PRESETS: Mapping[str, Mapping[Key, Any]] = {
    # The paper's own settings: sections 3.1 to 3.3 and 4.4, and appendix A for the quantiser.
    "memory3": {
        ("memory", "layers"): "first-half",
        ("memory", "tokens_per_head"): 8,
        ("memory", "reference_tokens"): 128,
        ("memory", "sink"): "Reference:",
        ("memory", "place"): "start",
        ("memory", "sinks"): "once",
        ("memory", "positions"): "parallel",
        ("memory", "attention_temperature"): 1.0,
        ("codec", "kind"): "product",
        ("codec", "preset"): "memory3",
        ("embedder", "kind"): "flag-embedding",
        ("embedder", "path"): "BAAI/bge-m3",
        ("recall", "chunk_tokens"): 64,
        ("recall", "memories"): 5,
        ("recall", "min_score"): -1.0,  # every chunk has its five, however near
        ("recall", "margin"): None,
        ("recall", "score_temperature"): None,
    }
}
"""By name, the value of each key."""


def unsaid(tree: Mapping[str, Any]) -> dict[Key, Any]:
    """What the preset of a configuration's tree says, and the tree itself does not.

    The codec's options are left to a section that says anything of them: options of one kind, or beside others, fit
    no other. Trees need not be valid.
    """
    memory = tree.get("memory")
    name = memory.get("preset") if isinstance(memory, Mapping) else getattr(memory, "preset", None)
    found = dict(PRESETS.get(name, {})) if isinstance(name, str) else {}
    given = {section: tree.get(section) for section, _ in found}
    codec = given.get("codec")
    if isinstance(codec, Mapping) and (set(codec) - {"kind"} or codec.get("kind", "product") != "product"):
        found.pop(("codec", "preset"), None)

    def speaks(section: str, key: str) -> bool:
        value = given[section]
        return value is not None and (not isinstance(value, Mapping) or key in value)

    return {key: value for key, value in found.items() if not speaks(*key)}


def filled(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with what its preset gives."""
    new = dict(tree)
    for (section, key), value in unsaid(tree).items():
        new[section] = {**(new.get(section) or {}), key: value}
    return new
