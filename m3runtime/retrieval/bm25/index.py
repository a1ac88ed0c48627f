"""`Bm25Index`: a `LexicalIndex` in numpy."""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m3runtime.errors import IndexFileError, InputError
from m3runtime.memory.block import Ids, as_ids
from m3runtime.retrieval.bm25.segment import Segment
from m3runtime.retrieval.bm25.words import words
from m3runtime.retrieval.lexical import Hits, LexicalIndex

_K1, _B = 1.2, 0.75
_MOST = 50_000
"""Occurrences that one search looks at, of its rarest words first: nearly every text has the others."""
_FORMAT = "m3 bm25 1"
_ARRAYS = {"ids": np.uint64, "lengths": np.uint32, "starts": np.int64, "texts": np.uint32, "counts": np.uint8}
_ALIGNED = 8
_NOTHING = Segment.of(as_ids(()), ())


@dataclass(frozen=True)
class _Held:
    """All that is held at one instant."""

    segments: tuple[Segment, ...] = ()

    @cached_property
    def size(self) -> int:
        """The number of texts."""
        return sum(len(segment.ids) for segment in self.segments)

    @cached_property
    def norms(self) -> list[npt.NDArray[np.float32]]:
        """BM25's part for the length of each text, of each segment."""
        total = sum(int(segment.lengths.sum(dtype=np.int64)) for segment in self.segments)
        each = (segment.lengths * (self.size / max(1, total)) for segment in self.segments)
        return [(_K1 * (1 - _B + _B * lengths)).astype(np.float32) for lengths in each]


class Bm25Index(LexicalIndex):
    """Okapi BM25 (k1 1.2, b 0.75) over `words`.

    Texts lie in segments that never change, and those of similar size are joined: a text is moved about log2(n) times.
    A million texts of a hundred words take half a gigabyte. A search looks at a bounded number of occurrences, which
    takes about a millisecond however many texts there are. Thread-safe: a search waits for nobody.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = _Held()

    def add(self, ids: Ids, texts: Sequence[str]) -> None:
        """Add texts, as `LexicalIndex.add` says."""
        if len(ids) != len(texts):
            raise InputError(f"lexical index: {len(ids)} ids for {len(texts)} texts")
        unique, first = np.unique(ids.astype(np.uint64), return_index=True)
        with self._lock:
            new = ~np.isin(unique, self.ids())
            if not new.any():
                return
            segments = [*self._held.segments, Segment.of(unique[new], [texts[at] for at in first[new].tolist()])]
            while len(segments) > 1 and len(segments[-2].ids) <= 2 * len(segments[-1].ids):
                segments[-2:] = [Segment.joined(segments[-2:])]
            self._held = _Held(tuple(segments))

    def remove(self, ids: Ids) -> None:
        """Remove ids, and the words that only their texts have."""
        with self._lock:
            left = [segment.without(ids) for segment in self._held.segments]
            self._held = _Held(tuple(segment for segment in left if len(segment.ids)))

    def search(self, texts: Sequence[str], k: int, among: Ids | None = None) -> list[Hits]:
        """Search as `LexicalIndex.search` says; a word that a text repeats counts once."""
        if k < 0:
            raise InputError(f"lexical index: k must not be negative, not {k}")
        held = self._held
        return [_best(held, sorted(set(words(text))), k, among) for text in texts]

    def ids(self) -> Ids:
        """All ids held, ascending."""
        return np.sort(np.concatenate([as_ids(()), *(segment.ids for segment in self._held.segments)]))

    def __len__(self) -> int:
        return self._held.size

    def save(self, path: Path) -> None:
        """Write a line of JSON that tells the arrays, the words, and the arrays, each at a multiple of 8 bytes."""
        segments = self._held.segments
        segment = Segment.joined(segments) if len(segments) > 1 else (*segments, _NOTHING)[0]
        terms = "\n".join(segment.terms).encode()
        arrays = {name: np.ascontiguousarray(getattr(segment, name), dtype) for name, dtype in _ARRAYS.items()}
        sizes = {name: len(array) for name, array in arrays.items()}
        head = json.dumps({"format": _FORMAT, "terms": len(terms), **sizes}).encode() + b"\n"
        with path.open("wb") as file:
            for part in (head, terms, *(array.tobytes() for array in arrays.values())):
                file.write(part)
                file.write(bytes(-file.tell() % _ALIGNED))

    def load(self, data: memoryview) -> None:
        """Map the bytes that `save` wrote: only the words are copied."""
        line, _, _ = bytes(data[:1024]).partition(b"\n")
        try:
            head = json.loads(line)
            if head["format"] != _FORMAT:
                raise IndexFileError(f"the lexical index is of format {str(head['format'])[:40]!r}, not {_FORMAT!r}")
            at = _after(len(line) + 1)
            text = bytes(data[at : at + head["terms"]]).decode()
            at = _after(at + head["terms"])
            arrays = {}
            for name, dtype in _ARRAYS.items():
                arrays[name] = np.frombuffer(data, dtype, head[name], at)
                at = _after(at + arrays[name].nbytes)
        except (ValueError, KeyError, TypeError) as error:
            raise IndexFileError(f"this is no lexical index: {error}") from error
        segment = Segment(terms=tuple(text.split("\n")) if text else (), **arrays)
        with self._lock:
            self._held = _Held((segment,) if len(segment.ids) else ())


def _best(held: _Held, asked: Sequence[str], k: int, among: Ids | None) -> Hits:
    """The best texts for these words."""
    spans = {word: [segment.span(word) for segment in held.segments] for word in asked}
    frequency = {word: sum(span.stop - span.start for span in of_word) for word, of_word in spans.items()}
    found, found_scores = [as_ids(())], [np.zeros(0, np.float32)]
    rarest = _rarest(frequency)
    for at, (segment, norms) in enumerate(zip(held.segments, held.norms, strict=True)):
        scores = np.zeros(len(segment.ids), np.float32)
        for word in rarest:
            texts, counts = segment.texts[spans[word][at]], segment.counts[spans[word][at]].astype(np.float32)
            rarity = np.log1p((held.size - frequency[word] + 0.5) / (frequency[word] + 0.5))
            scores[texts] += np.float32(rarity * (_K1 + 1)) * counts / (counts + norms[texts])
        hit = np.flatnonzero(scores)
        if among is not None:
            hit = hit[_is_in(segment.ids[hit], among)]
        if len(hit) > k > 0:  # all that are as good as the last of them: their ids decide
            hit = hit[scores[hit] >= np.partition(scores[hit], len(hit) - k)[len(hit) - k]]
        found.append(segment.ids[hit])
        found_scores.append(scores[hit])
    ids, best = np.concatenate(found), np.concatenate(found_scores)
    order = np.lexsort((ids, -best))[:k]
    return ids[order], best[order]


def _rarest(frequency: Mapping[str, int]) -> list[str]:
    """The words that any text has, the rarest first, as long as their occurrences are not too many together."""
    chosen, seen = list[str](), 0
    for word, occurrences in sorted(frequency.items(), key=lambda one: (one[1], one[0])):
        seen += occurrences
        if chosen and seen > _MOST:
            break
        if occurrences:
            chosen.append(word)
    return chosen


def _is_in(ids: Ids, among: Ids) -> npt.NDArray[np.bool_]:
    """Which of ``ids`` are among ids that are ascending?"""
    if not len(among):
        return np.zeros(len(ids), np.bool_)
    found: npt.NDArray[np.bool_] = among[np.minimum(np.searchsorted(among, ids), len(among) - 1)] == ids
    return found


def _after(place: int) -> int:
    return place + -place % _ALIGNED
