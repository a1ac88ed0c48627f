"""`ReferenceSpool`: the references that documents are remembered as, in a temporary file."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b

from m3runtime.documents.document import Document
from m3runtime.documents.parts import located
from m3runtime.documents.reference import Place, Reference
from m3runtime.documents.splitting import Splitter
from m3runtime.errors import InputError

_CACHE_KIB = 16 << 10
"""Memory for pages of the file that are used again."""
_SETTINGS = f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-{_CACHE_KIB};"
_TABLES = """
CREATE TABLE reference (number INTEGER PRIMARY KEY, digest BLOB UNIQUE, text BLOB, tokens INTEGER, heading BLOB);
CREATE TABLE place (reference INTEGER, source BLOB, start INTEGER, stop INTEGER, metadata TEXT);
CREATE INDEX places_of ON place (reference);
"""
_ADD = "INSERT OR IGNORE INTO reference VALUES (NULL, ?, ?, ?, ?)"
_ADD_PLACE = "INSERT INTO place SELECT number, ?, ?, ?, ? FROM reference WHERE digest = ?"
_GET = "SELECT number, text, tokens, heading FROM reference"
_GET_PLACES = "SELECT source, start, stop, metadata FROM place WHERE reference = ? ORDER BY rowid"

_Row = tuple[int, bytes, int, bytes]


class ReferenceSpool:
    """The references of documents in order, equal ones once with all their places.

    With ``whole`` every document is one reference. ``references`` follow as they are.

    Documents are read once, to their end, when the spool is made: a mistake in any of them shows before the first
    reference is used. It takes bounded memory and a temporary file as large as the texts and some hundred bytes for
    each reference, which is removed when the spool is closed or its process ends; the environment variable ``TMPDIR``
    says in which folder. For the thread that made it.

    Raises `InputError` for a document that is too long to be whole, for an empty corpus unless it ``may_be_empty``, and
    what reading and splitting raise.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        splitter: Splitter,
        references: Iterable[Reference] = (),
        *,
        whole: bool = False,
        may_be_empty: bool = False,
    ) -> None:
        self.documents = 0
        """Documents that were read."""
        self.sources: dict[str, int] = {}
        """The sources of the documents, in order, and the references known when the last document of each was read.

        The references of a source are among so many first ones.
        """
        self._file = sqlite3.connect("", isolation_level=None)  # without a name it is a temporary file
        try:
            self._file.executescript(f"{_SETTINGS} {_TABLES}")
            self._file.execute("BEGIN")
            self._count = 0
            for document in documents:
                self.documents += 1
                for reference in _split(document, splitter, whole=whole):
                    self._add(reference, document.metadata)
                self.sources.pop(document.source, None)
                self.sources[document.source] = self._count
            for reference in references:
                self._add(reference, {})
            if not (self._count or may_be_empty):
                raise InputError("the corpus is empty: there is nothing to remember")
        except sqlite3.OperationalError as error:
            self.close()
            raise InputError(f"the references do not fit in a temporary file: {error}; set TMPDIR") from error
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Reference]:
        return map(self._reference, self._file.execute(f"{_GET} ORDER BY number"))

    def __getitem__(self, place: int) -> Reference:
        """The reference at a place from 0 on."""
        row = self._file.execute(f"{_GET} WHERE number = ?", (place + 1,)).fetchone()
        if row is None:
            raise IndexError(place)
        return self._reference(row)

    def places(self, reference: Reference) -> tuple[Place, ...]:
        """The places that the documents have of a reference's text and heading."""
        row = self._file.execute(f"{_GET} WHERE digest = ?", (_digest(reference),)).fetchone()
        return () if row is None else self._reference(row).places

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()

    def _add(self, reference: Reference, metadata: Mapping[str, str]) -> None:
        """Add a reference, or its places if it is known."""
        digest = _digest(reference)
        row = digest, _packed(reference.text), reference.tokens, _packed(reference.heading)
        self._count += self._file.execute(_ADD, row).rowcount
        for place in reference.places:
            known = json.dumps({**metadata, **place.metadata})
            self._file.execute(_ADD_PLACE, (_packed(place.source), place.start, place.end, known, digest))

    def _reference(self, row: _Row) -> Reference:
        number, text, tokens, heading = row
        places = [
            Place(_unpacked(source), start, end, json.loads(metadata))
            for source, start, end, metadata in self._file.execute(_GET_PLACES, (number,))
        ]
        return Reference(_unpacked(text), tokens, _unpacked(heading), tuple(places))


def _split(document: Document, splitter: Splitter, *, whole: bool) -> Iterator[Reference]:
    """The references of a document."""

    def split(blocks: Iterable[str]) -> Iterator[Reference]:
        return _uncut(document, "".join(blocks), splitter) if whole else splitter.stream(blocks, document.source)

    return located(document.parts(), split)


def _uncut(document: Document, whole: str, splitter: Splitter) -> Iterator[Reference]:
    """A document as one passage."""
    text = whole.strip()
    start = whole.index(text)
    tokens, limit = splitter.count_tokens(text), splitter.max_tokens
    if tokens > limit:
        raise InputError(
            f"{document.name}: {tokens} tokens, but a reference has at most {limit}; "
            "shorten it, or write without --whole"
        )
    yield Reference(text, tokens, places=(Place(document.source, start, start + len(text)),))


def _digest(reference: Reference) -> bytes:
    text, heading = _packed(reference.text), _packed(reference.heading)
    return blake2b(b"%d %b%b" % (len(heading), heading, text), digest_size=16).digest()


def _packed(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # file names may hold lone surrogates


def _unpacked(text: bytes) -> str:
    return text.decode("utf-8", "surrogatepass")
