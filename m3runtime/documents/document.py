"""`Document`: a text that is to be remembered, and where it came from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

from m3runtime.documents.embedded import OnLeftOut, without_embedded
from m3runtime.documents.parts import Part, Read
from m3runtime.documents.readers import plain
from m3runtime.documents.reference import Place


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from. A line feed ends its lines, and base64 is left out, whatever the file had."""

    source: str
    """The name of the file."""
    content: str | Path
    """The text, or the file that holds it, which is read each time that the text is asked for."""
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    """See `Place.metadata`. A line of JSON has its source, id or line number as ``record``."""
    read: Read = plain.read
    """Reads the file."""

    @property
    def name(self) -> str:
        """The source, and behind a colon its record, if it has any."""
        return Place(self.source, 0, 0, self.metadata).name

    @property
    def text(self) -> str:
        """The whole text, in memory."""
        return "".join(self.blocks())

    def blocks(self, left_out: OnLeftOut | None = None) -> Iterator[str]:
        """The text in pieces, cut anywhere; see `parts`."""
        return (part.text for part in self.parts(left_out))

    def parts(self, left_out: OnLeftOut | None = None) -> Iterator[Part]:
        """The text in pieces, each with its place, such as its page; without pictures and files in base64.

        ``left_out`` is called with the place and length of each that was left out. Raises `InputError` if the file
        cannot be read.
        """
        parts = [Part(self.content)] if isinstance(self.content, str) else self.read(self.content)
        length = 0
        for metadata, some in groupby(parts, key=lambda part: part.metadata):
            moved = left_out and partial(_moved, left_out, length)
            for text in without_embedded((part.text for part in some), moved):
                length += len(text)
                if text:
                    yield Part(text, metadata)


def _moved(left_out: OnLeftOut, start: int, place: int, count: int) -> None:
    left_out(start + place, count)
