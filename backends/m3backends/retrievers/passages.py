"""`passages`: the references that a runtime finds for a text, as retrievers hand them out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m3runtime.config.where import conditions
from m3runtime.documents.reference import Place
from m3runtime.errors import InputError
from m3runtime.retrieval.restriction import Restriction
from m3runtime.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Passage:
    """A reference that was found."""

    id: int
    text: str
    """The text under its heading."""
    score: float
    metadata: dict[str, Any]
    """The first readable place: ``source``, ``start``, ``end`` and its metadata; the ``heading``; the ``score``;
    and ``sources``, of all such places."""


def passages(runtime: Runtime, text: str, k: int | None, where: Mapping[str, Any] | None) -> list[Passage]:
    """The references that a recall would choose; with ``k`` so many whatever the scores.

    ``where`` has the form of ``recall.where``, and narrows that. Raises `InputError` for another form.
    """
    try:
        restriction = Restriction(where=conditions(where or {}))
    except ValueError as error:
        raise InputError(f"where {error}") from None
    (matches,) = runtime.search([text], k, restriction)
    readable = restriction.within(runtime.where)
    found = []
    for match, reference in zip(matches, runtime.cited(matches), strict=True):
        places = [] if reference is None else [place for place in reference.places if readable.allows(place)]
        if reference is not None and places:
            metadata = {**_facts(places[0]), "heading": reference.heading, "score": match.score}
            metadata["sources"] = list(dict.fromkeys(place.name for place in places))
            found.append(Passage(match.id, reference.headed, match.score, metadata))
    return found


def _facts(place: Place) -> dict[str, Any]:
    return {**place.metadata, "source": place.name, "start": place.start, "end": place.end}
