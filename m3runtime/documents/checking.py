"""`Check`: reads a file before anything is done with it, to its end."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from m3runtime.documents.document import Document
from m3runtime.documents.reading import OnUnread
from m3runtime.documents.sample import Sample
from m3runtime.errors import InputError


@dataclass(slots=True)
class Check:
    """The result of reading a file."""

    has_text: bool = False
    reasons: list[str] = field(default_factory=list)
    """Why it, or records of it, cannot be read."""
    left_out: list[str] = field(default_factory=list)
    """Pictures and files in base64 that its documents leave out, and where."""

    @property
    def is_bad(self) -> bool:
        """True if nothing of the file can be read."""
        return bool(self.reasons) and not self.has_text

    @classmethod
    def of(cls, documents: Callable[[OnUnread], Iterable[Document]], sample: Sample) -> "Check":
        """Read all documents of a file, given the function for records that cannot be read. They pass ``sample``."""
        check = cls()
        try:
            for document in documents(lambda error: check.reasons.append(str(error))):
                check._read(document, sample)
        except InputError as error:
            return cls(reasons=[str(error)])
        return check

    def _read(self, document: Document, sample: Sample) -> None:
        def left_out(place: int, length: int) -> None:
            self.left_out.append(f"{document.name}: {length} characters of base64 at {place}")

        self.has_text = True
        for _ in sample.of(document.blocks(left_out)):
            pass  # a mistake may be near the end
