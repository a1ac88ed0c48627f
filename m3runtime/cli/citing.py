"""Citations: where a reference stands, as JSON and as a line."""

from dataclasses import asdict
from typing import Any

from m3runtime.documents.reference import Place, Reference

_SHOWN = 3
"""The number of places that a line names; JSON has all."""


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


def _name(place: Place) -> str:
    """A place's name, with its page if it has one."""
    page = place.metadata.get("page")
    return place.name if page is None else f"{place.name}, page {page}"
