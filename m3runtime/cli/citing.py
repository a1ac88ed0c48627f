"""Citations and sources: where a reference stands, as JSON and as a line, and the folders of many sources."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from m3runtime.documents.reference import Place, Reference

_SHOWN = 3
"""The number of places that a line names; JSON has all."""
_LISTED = 20
"""The number of lines for sources."""


def citation(reference: Reference) -> dict[str, Any]:
    """The text, its heading and all of its places; ``source`` is the name of the first."""
    return {
        "source": reference.places[0].name,
        "heading": reference.heading,
        "places": [asdict(place) for place in reference.places],
        "text": reference.text,
    }


def cited(reference: Reference) -> str:
    """The places of a reference and its heading in a line."""
    names = list(dict.fromkeys(map(_name, reference.places)))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more + (f" > {reference.heading}" if reference.heading else "")


def summarised(sources: Mapping[str, int]) -> dict[str, str]:
    """The references of each source, or of the folders of sources that are too many to list."""
    if len(sources) <= _LISTED:
        return {name: str(count) for name, count in sources.items()}
    folders = dict[str, list[int]]()
    for depth in range(1, max(name.count("/") for name in sources) + 2):
        deeper = dict[str, list[int]]()
        for name, count in sources.items():
            parts = name.split("/")
            folder = name if len(parts) <= depth else "/".join(parts[:depth]) + "/"
            deeper.setdefault(folder, []).append(count)
        if folders and len(deeper) > _LISTED:
            break
        folders = deeper
    most = sorted(folders, key=lambda folder: -sum(folders[folder]))[:_LISTED]
    shown = {
        folder: f"{sum(folders[folder])}" + (f" in {len(folders[folder])} files" if folder.endswith("/") else "")
        for folder in sorted(most)
    }
    if left := len(sources) - sum(len(folders[folder]) for folder in most):
        shown["others"] = f"{left} files; --all lists every source"
    return shown


def _name(place: Place) -> str:
    """A place's name and whatever else is known of it, such as its page; a title is in the heading."""
    parts = (f"{key} {value}" for key, value in place.metadata.items() if key not in ("record", "title"))
    return ", ".join((place.name, *parts))
