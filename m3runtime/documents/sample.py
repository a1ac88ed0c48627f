"""`Sample`: a little of every document, to judge the whole by."""

from collections.abc import Iterable, Iterator

MOST_DOCUMENTS = 500
_CHARACTERS = 1000


class Sample:
    """The beginnings of the first documents that pass through it."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def of(self, blocks: Iterable[str]) -> Iterator[str]:
        """The blocks of one document as they are; the first is sampled."""
        for number, block in enumerate(blocks):
            if number == 0 and len(self.texts) < MOST_DOCUMENTS and block.strip():
                self.texts.append(block[:_CHARACTERS])
            yield block
