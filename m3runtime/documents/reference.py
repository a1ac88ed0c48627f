"""`Reference`: a text that is remembered, the unit of memory; and the `Place`s that it stands at."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from m3runtime.documents.expiry import EXPIRES, is_over

BETWEEN_TITLES = " > "
"""Stands between the titles of a heading."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place where a reference stands. ``start`` and ``end`` count characters of a document's text."""

    source: str
    """The file: or whatever else its document was read from."""
    start: int
    end: int
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Short texts to cite, such as ``page``, ``row``, ``title`` and ``url``.

    ``record`` names one document of a source that has many. ``expires`` is the last day of the place.
    """

    @property
    def name(self) -> str:
        """The source, and behind a colon its record, if it has any."""
        record = self.metadata.get("record")
        return self.source if record is None else f"{self.source}:{record}"

    @property
    def expires(self) -> str:
        """The last day on which the place counts, such as ``2027-01-31`` in UTC; no text if it does not expire."""
        return self.metadata.get(EXPIRES, "")


@dataclass(frozen=True, slots=True)
class Reference:
    """A text that is remembered under a heading. A bank remembers the same heading and text once, whatever places."""

    text: str
    tokens: int
    """Tokens that the text has to the model."""
    heading: str = ""
    """The headings that the text stands under, such as ``Chapter > Section``."""
    places: tuple[Place, ...] = ()
    """All places of this heading and text, in the order in which they were written."""

    def places_in(self, source: str) -> list[Place]:
        """The places in one source."""
        return [place for place in self.places if place.source == source]

    def living(self, today: str) -> tuple[Place, ...]:
        """The places that have not expired. Without any the reference counts as forgotten."""
        return tuple(place for place in self.places if not is_over(place.expires, today))

    def joined(self, others: "Sequence[Reference]") -> "Reference":
        """This reference with the places of others that say the same behind its own."""
        if not others:
            return self
        return replace(self, places=self.places + tuple(place for one in others for place in one.places))

    @property
    def headed(self) -> str:
        """The heading, a line feed and the text, as it is embedded; the text alone if there is no heading."""
        return f"{self.heading}\n{self.text}" if self.heading else self.text

    def headed_within(self, most: int, count_tokens: Callable[[str], int]) -> str:
        """`headed` in at most that many tokens, as the model reads it: without the first titles if they do not fit."""
        titles = self.heading.split(BETWEEN_TITLES) if self.heading else []
        while titles:
            headed = f"{BETWEEN_TITLES.join(titles)}\n{self.text}"
            if count_tokens(headed) <= most:
                return headed
            del titles[0]
        return self.text

    @property
    def source(self) -> str:
        """The source of the first place."""
        return self.places[0].source

    @property
    def start(self) -> int:
        """The start of the first place."""
        return self.places[0].start

    @property
    def end(self) -> int:
        """The end of the first place."""
        return self.places[0].end

    @property
    def sources(self) -> tuple[str, ...]:
        """The source of each place, each once."""
        return tuple(dict.fromkeys(place.source for place in self.places))
