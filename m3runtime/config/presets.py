"""Presets: defaults that belong together, named by one word in the configuration. Given values take precedence."""

from collections.abc import Mapping
from typing import Any

ORIGIN = "memory.preset"
"""The origin of a value that a preset gave."""

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # The paper's own settings: sections 3.1 to 3.3 and 4.4, and appendix A for the quantiser.
    "memory3": {
        "memory": {
            "layers": "first-half",
            "tokens_per_head": 8,
            "select_by": "attention",
            "reference_tokens": 128,
            "sink": "Reference:",
            "place": "start",
            "sinks": "once",
            "positions": "parallel",
            "attention_temperature": 1.0,
            "attention_weight": 1.0,
        },
        "codec": {"kind": "product", "preset": "memory3"},
        "embedder": {"kind": "flag-embedding", "path": "BAAI/bge-m3"},
        "recall": {
            "chunk_tokens": 64,
            "memories": 5,
            "min_score": -1.0,  # every chunk has its five, however near
            "margin": None,
            "score_temperature": None,
        },
    }
}
"""The values of each preset, by section and key."""


def fill(preset: object, section: str, given: object) -> object:
    """A section's values: the given ones, and the preset's for other keys. Nothing needs to be valid yet.

    A codec section that gives anything but ``kind: product`` and ``sample_tokens`` keeps its own options, since the
    preset's options fit no others.
    """
    ours = PRESETS.get(preset, {}).get(section, {}) if isinstance(preset, str) else {}
    if not ours or not isinstance(given, Mapping | None):
        return given
    given = given or {}
    own = {"kind": "product", **{key: value for key, value in given.items() if key != "sample_tokens"}}
    if section == "codec" and own != {"kind": "product"}:
        ours = {"kind": ours["kind"]}
    return {**ours, **given}


def keys(values: Mapping[str, Any]) -> set[tuple[str, str]]:
    """The keys that the preset of a configuration has values for."""
    sections = PRESETS.get(values.get("memory", {}).get("preset"), {})
    return {(section, key) for section, ours in sections.items() for key in ours}
