"""`Recalls`: recalls memories for many rows at once, beside the steps of others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, TypeVar

from m3runtime.recall.recalled import Recalled
from m3runtime.retrieval.query import Text
from m3runtime.stream import Stream

Who = TypeVar("Who")


@dataclass(frozen=True, slots=True)
class Asking(Generic[Who]):
    """One row's next recall."""

    who: Who
    stream: Stream
    text: Text
    wait: bool | None
    """Wait for late memories? None: as ``recall.when_late`` says."""
    next_text: Text | None = None
    """The text of the recall after it, where that is known already: it is looked up in the background."""


@dataclass(frozen=True, slots=True)
class Found(Generic[Who]):
    """What a recall brought, or the error that it ended with."""

    who: Who
    recalled: Recalled | Exception


def recall(asking: Sequence[Asking[Who]]) -> list[Found[Who]]:
    """Recall for all, in one call for each runtime; where that fails, one by one: each has its own error."""
    found = []
    for _, together in groupby(asking, key=lambda one: (id(one.stream.runtime), one.stream.dtype, one.wait)):
        group = list(together)
        runtime = group[0].stream.runtime
        try:
            recalled = runtime.recall([one.stream for one in group], [one.text for one in group], wait=group[0].wait)
            ahead = [one for one in group if one.next_text is not None]
            if ahead:
                runtime.hint([one.stream for one in ahead], [one.next_text or "" for one in ahead])
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            if len(group) == 1:
                found.append(Found(group[0].who, error))
            else:
                found += [one for each in group for one in recall([each])]
        else:
            found += [Found(one.who, each) for one, each in zip(group, recalled, strict=True)]
    return found


def hint(asking: Sequence[tuple[Who, Stream, Text]], failed: Callable[[Who, Exception], None]) -> None:
    """Look ahead for all, in one call for each runtime. ``failed`` is told of whoever could not."""
    for _, together in groupby(asking, key=lambda one: id(one[1].runtime)):
        group = list(together)
        try:
            group[0][1].runtime.hint([stream for _, stream, _ in group], [text for _, _, text in group])
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            for who, _, _ in group:
                failed(who, error)
