"""`references_of`: the references that documents are remembered as."""

from collections.abc import Iterable, Iterator
from hashlib import blake2b

from m3runtime.documents.reading import Document, one_word
from m3runtime.documents.reference import Reference
from m3runtime.documents.splitting import Splitter
from m3runtime.errors import InputError


def references_of(documents: Iterable[Document], splitter: Splitter, *, whole: bool = False) -> Iterator[Reference]:
    """The references of documents in order, equal texts once; with ``whole`` every document is one.

    Of what went by, sixteen bytes of each text's digest are kept. Raises `InputError`, while it is iterated, for a
    document of one word, one that is too long to be whole, and at the end if there was nothing at all.
    """
    seen: set[bytes] = set()
    for document in documents:
        if one_word(document.text):
            raise InputError(f"{document.source}: a text of one word is no reference; give it a sentence")
        for reference in _whole(document, splitter) if whole else _split(document, splitter):
            digest = blake2b(reference.text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield reference
    if not seen:
        raise InputError("the corpus is empty: there is nothing to remember")


def _split(document: Document, splitter: Splitter) -> Iterator[Reference]:
    for passage in splitter.split(document.text):
        yield Reference(passage.text, document.source, passage.start, passage.end, passage.tokens)


def _whole(document: Document, splitter: Splitter) -> Iterator[Reference]:
    text = document.text.strip()
    start = document.text.index(text)
    tokens, limit = splitter.count_tokens(text), splitter.max_tokens
    if tokens > limit:
        raise InputError(
            f"{document.source}: {tokens} tokens, but a reference has at most {limit}; "
            "shorten it, or write without --whole"
        )
    yield Reference(text, document.source, start, start + len(text), tokens)
