"""`embed_in_windows`: texts that are longer than a model reads, embedded in parts."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Spans = Callable[[str], Sequence[tuple[int, int]]]
"""The characters of each token of a text, without special tokens."""


def embed_in_windows(
    texts: Sequence[str], embed: Callable[[list[str]], Sequence[Vectors] | Vectors], spans: Spans | None, room: int
) -> list[Vectors]:
    """A vector of each text: of a text of more than ``room`` tokens the mean of its windows' vectors.

    A window has at most ``room`` tokens, those of a text are about equally long and do not overlap, and each counts by
    its tokens. Cut at its end, as the libraries do, a long text could not be found by what stands there.
    """
    pieces: list[str] = []
    weights: list[list[int]] = []
    for text in texts:
        windows = list(_windows(text, spans, room))
        pieces += [window for window, _ in windows]
        weights.append([tokens for _, tokens in windows])
    rows = iter(embed(pieces))
    return [_mean([next(rows) for _ in counts], counts) for counts in weights]


def token_spans(tokenizer: Any) -> Spans | None:
    """The spans of a tokenizer of the transformers library; None if it does not tell them."""

    def spans(text: str) -> Sequence[tuple[int, int]]:
        options = {"add_special_tokens": False, "truncation": False, "verbose": False, "return_offsets_mapping": True}
        return tokenizer(text, **options)["offset_mapping"]  # type: ignore[no-any-return]

    return spans if tokenizer.is_fast else None


def _windows(text: str, spans: Spans | None, room: int) -> Iterator[tuple[str, int]]:
    """The windows of a text and their tokens; one if it fits."""
    if spans is None or room < 1 or len(text.encode(errors="replace")) <= room:  # a token has a byte or more
        yield text, 1
        return
    offsets = [span for span in spans(text) if span[0] < span[1]]
    parts = -(-len(offsets) // room)
    if parts < 2:
        yield text, 1
        return
    for first, last in pairwise(len(offsets) * part // parts for part in range(parts + 1)):
        yield text[offsets[first][0] : offsets[last - 1][1]], last - first


def _mean(rows: Sequence[Vectors], counts: Sequence[int]) -> Vectors:
    return rows[0] if len(rows) == 1 else np.average(rows, axis=0, weights=counts).astype(np.float32)
