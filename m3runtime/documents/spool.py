"""`ReferenceSpool`: the references that documents are remembered as, in a temporary file."""

import sqlite3
from collections.abc import Iterable, Iterator
from hashlib import blake2b

from m3runtime.documents.reading import Document, one_word
from m3runtime.documents.reference import Reference
from m3runtime.documents.splitting import Splitter
from m3runtime.errors import InputError

_CACHE_KIB = 16 << 10
"""Memory for pages of the file that are used again."""
_SETTINGS = f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-{_CACHE_KIB};"
_TABLE = """CREATE TABLE reference (
    number INTEGER PRIMARY KEY, digest BLOB UNIQUE, text BLOB, source BLOB, start INTEGER, stop INTEGER, tokens INTEGER
)"""
_ADD = "INSERT OR IGNORE INTO reference VALUES (NULL, ?, ?, ?, ?, ?, ?)"
_GET = "SELECT text, source, start, stop, tokens FROM reference"

_Row = tuple[bytes, bytes, int, int, int]


class ReferenceSpool:
    """The references of documents in order, equal texts once. With ``whole`` every document is one reference.

    Documents are read once, to their end, when the spool is made: a mistake in any of them shows before the first
    reference is used. It takes bounded memory and a temporary file as large as the texts and some hundred bytes for
    each reference, which is removed when the spool is closed or its process ends; the environment variable ``TMPDIR``
    says in which folder. For the thread that made it.

    Raises `InputError` for a document of one word, one that is too long to be whole, for an empty corpus, and what
    reading and splitting raise.
    """

    def __init__(self, documents: Iterable[Document], splitter: Splitter, *, whole: bool = False) -> None:
        self.documents = 0
        """Documents that were read."""
        self._file = sqlite3.connect("", isolation_level=None)  # without a name it is a temporary file
        try:
            self._file.executescript(f"{_SETTINGS} {_TABLE}")
            self._file.execute("BEGIN")
            self._count = self._file.executemany(_ADD, self._rows(documents, splitter, whole=whole)).rowcount
            if self._count < 1:
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
        return map(_reference, self._file.execute(f"{_GET} ORDER BY number"))

    def __getitem__(self, place: int) -> Reference:
        """The reference at a place from 0 on."""
        row = self._file.execute(f"{_GET} WHERE number = ?", (place + 1,)).fetchone()
        if row is None:
            raise IndexError(place)
        return _reference(row)

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()

    def _rows(
        self, documents: Iterable[Document], splitter: Splitter, *, whole: bool
    ) -> Iterator[tuple[bytes, bytes, bytes, int, int, int]]:
        for document in documents:
            self.documents += 1
            if all(one_word(block) for block in document.blocks()):
                raise InputError(f"{document.source}: a text of one word is no reference; give it a sentence")
            source = _packed(document.source)
            for one in _uncut(document, splitter) if whole else splitter.stream(document.blocks(), document.source):
                text = _packed(one.text)
                yield blake2b(text, digest_size=16).digest(), text, source, one.start, one.end, one.tokens


def _uncut(document: Document, splitter: Splitter) -> Iterator[Reference]:
    """A document as one passage."""
    whole = document.text
    text = whole.strip()
    start = whole.index(text)
    tokens, limit = splitter.count_tokens(text), splitter.max_tokens
    if tokens > limit:
        raise InputError(
            f"{document.source}: {tokens} tokens, but a reference has at most {limit}; "
            "shorten it, or write without --whole"
        )
    yield Reference(text, document.source, start, start + len(text), tokens)


def _packed(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # file names may hold lone surrogates


def _reference(row: _Row) -> Reference:
    text, source, start, end, tokens = row
    return Reference(text.decode("utf-8", "surrogatepass"), source.decode("utf-8", "surrogatepass"), start, end, tokens)
