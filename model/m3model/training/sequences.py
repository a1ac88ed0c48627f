"""The token sequences that a model is trained on, and the reference that each chunk of them retrieves.

They lie in files that are mapped into memory: a corpus may be larger than the machine's memory.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from m3model.memory3 import NO_LABEL
from m3runtime.errors import InputError

Tokens = npt.NDArray[np.int32]
NOTHING = -1
"""Stands for no reference, where a chunk retrieves none."""
_GRAIN = 8
"""References are padded to multiples of it: what is compiled for a length serves more batches."""


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of tokens of different lengths: row ``i`` is ``tokens[ends[i - 1] : ends[i]]``."""

    tokens: Tokens
    """int32 ``[tokens of all rows]``."""
    ends: npt.NDArray[np.int64]
    """int64 ``[rows]``."""

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, index: int) -> Tokens:
        """One row."""
        return self.tokens[self.ends[index - 1] if index else 0 : self.ends[index]]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.ends, prepend=0)

    @classmethod
    def write(cls, folder: Path, rows: Iterable[Sequence[int]]) -> None:
        """Write rows, as they come, into a new folder, for `open`."""
        folder.mkdir()
        ends = array("q")
        with (folder / "tokens").open("wb") as file:
            for row in rows:
                file.write(np.asarray(row, "<i4").tobytes())
                ends.append(len(row) + (ends[-1] if ends else 0))
        np.save(folder / "ends.npy", np.asarray(ends, np.int64))

    @classmethod
    def open(cls, folder: Path) -> "TokenRows":
        """Map the rows that `write` wrote into memory."""
        ends = np.load(folder / "ends.npy", allow_pickle=False)
        if not ends.any():  # an empty file cannot be mapped
            return cls(np.zeros(0, np.int32), ends)
        return cls(np.memmap(folder / "tokens", "<i4", mode="r"), ends)


def cut_sequences(
    documents: Iterable[Iterable[Sequence[int]]], length: int, end: int | None, *, pack: bool
) -> Iterator[list[int]]:
    """Sequences of at most ``length`` tokens of documents, each the pieces of its tokens; the token ``end`` follows it.

    With ``pack`` documents follow one another and every sequence is full (what is left over is dropped, unless it is
    all); else each document begins a sequence of its own. Raises `InputError` at the end if there was nothing to learn
    from.
    """
    nothing = True
    rest: list[int] = []
    for document in documents:
        for piece in chain(document, [] if end is None else [[end]]):
            rest.extend(piece)
            full = len(rest) // length * length
            for start in range(0, full if length > 1 else 0, length):
                nothing = False
                yield rest[start : start + length]
            rest = rest[full:]
        if not pack:
            if len(rest) > 1:  # a single token has nothing to predict
                nothing = False
                yield rest
            rest = []
    if nothing and len(rest) > 1:
        nothing = False
        yield rest
    if nothing:
        raise InputError("train.data: there is no text of two tokens to learn from")


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a run is trained on. It depends on texts, tokenizer and embedder, not on the model's weights.

    In a folder: ``sequences`` and ``references`` (`TokenRows`) and ``retrieved.npy``.
    """

    sequences: TokenRows
    references: TokenRows
    retrieved: Tokens
    """int32 ``[sequences, chunks]``: the reference that each chunk retrieves, or `NOTHING`."""

    @classmethod
    def open(cls, folder: Path) -> "Prepared":
        """Map the files of a folder into memory."""
        return cls(
            TokenRows.open(folder / "sequences"),
            TokenRows.open(folder / "references"),
            np.load(folder / "retrieved.npy", mmap_mode="r", allow_pickle=False),
        )


class TrainingSequences(Dataset[dict[str, Any]]):
    """Sequences, with the references that their chunks retrieved, or without (``reading=False``: the warmup).

    Without memory a sequence begins with ``begin``, its BOS; with memories the sink holds that token.
    """

    def __init__(self, prepared: Prepared, *, reading: bool, begin: int | None) -> None:
        self.prepared = prepared
        self.reading = reading
        self.begin = np.array([] if begin is None or reading else [begin], np.int32)

    def __len__(self) -> int:
        return len(self.prepared.sequences)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example: dict[str, Any] = {"ids": np.concatenate([self.begin, self.prepared.sequences.row(index)])}
        if self.reading:
            example["retrieved"] = self.prepared.retrieved[index]
        return example

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch as `Memory3ForCausalLM.forward` takes it, padded to the longest sequence and reference.

        References that several chunks retrieved come once.
        """
        ids, counts = _padded([example["ids"] for example in examples])
        there = torch.arange(ids.shape[1]) < counts[:, None]
        batch = {"input_ids": ids, "attention_mask": there.long(), "labels": ids.masked_fill(~there, NO_LABEL)}
        if not self.reading:
            return batch
        retrieved = np.stack([example["retrieved"] for example in examples])
        distinct, places = np.unique(retrieved, return_inverse=True)
        rows = [np.zeros(0, np.int32) if one == NOTHING else self.prepared.references.row(one) for one in distinct]
        batch["references"], batch["reference_counts"] = _padded(rows, _GRAIN)
        batch["reference_places"] = torch.from_numpy(places.reshape(retrieved.shape))
        return batch


def _padded(rows: Sequence[Tokens], grain: int = 1) -> tuple[Tensor, Tensor]:
    """Rows, padded with zeros to the longest (at least 1) or more: int64 ``[rows, longest]``, and their lengths."""
    lengths = np.array([len(row) for row in rows])
    padded = np.zeros((len(rows), -(-max(1, *lengths) // grain) * grain), np.int64)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(padded), torch.from_numpy(lengths)
