"""The token sequences that a model is trained on, and what each chunk of them retrieves."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from m3model.memory3 import NO_LABEL
from m3runtime.errors import InputError
from m3runtime.storage.files import write_atomically

Tokens = npt.NDArray[np.int32]
NOTHING = -1
"""Of a chunk that retrieves no reference."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of tokens of different lengths: ``ids`` is int32 ``[n, longest]``, of which row ``i`` has ``counts[i]``."""

    ids: Tokens
    counts: Tokens

    def __len__(self) -> int:
        return len(self.counts)

    def row(self, index: int) -> Tokens:
        """One row, as long as it is."""
        return self.ids[index, : self.counts[index]]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "Rows":
        """Beside each other."""
        counts = np.array([len(row) for row in rows], np.int32)
        ids = np.zeros((len(rows), int(counts.max(initial=0))), np.int32)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
        return cls(ids, counts)


def cut_sequences(documents: Iterable[Sequence[int]], length: int, end: int | None, *, pack: bool) -> Rows:
    """Documents' tokens, each document followed by the token ``end``, as sequences of at most ``length`` tokens.

    With ``pack`` documents follow one another and every sequence is full (what is left over is dropped, unless it is
    all); else each document begins a sequence of its own. Raises `InputError` if there is nothing to learn from.
    """
    rows: list[list[int]] = []
    flowing: list[int] = []
    for document in documents:
        tokens = [*document, *([] if end is None else [end])]
        if not pack:
            rows.extend(tokens[start : start + length] for start in range(0, len(tokens), length))
            continue
        flowing.extend(tokens)
        full = len(flowing) // length * length
        rows.extend(flowing[start : start + length] for start in range(0, full, length))
        flowing = flowing[full:]
    if not rows and flowing:
        rows.append(flowing)
    rows = [row for row in rows if len(row) > 1]  # of a single token there is nothing to predict
    if not rows:
        raise InputError("train.data: there is no text of two tokens to learn from")
    return Rows.of(rows)


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a run is trained on. It depends on texts, tokenizer and embedder, not on the model's weights."""

    sequences: Rows
    references: Rows
    retrieved: Tokens
    """int32 ``[sequences, chunks]``: which reference each chunk retrieves, or `NOTHING`."""

    def save(self, path: Path) -> None:
        """Write it by temporary file and rename."""
        write_atomically(path, self._write)

    def _write(self, path: Path) -> None:
        with path.open("wb") as file:  # a path would get the suffix .npz
            np.savez(
                file,
                ids=self.sequences.ids,
                counts=self.sequences.counts,
                reference_ids=self.references.ids,
                reference_counts=self.references.counts,
                retrieved=self.retrieved,
            )

    @classmethod
    def load(cls, path: Path) -> "Prepared":
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as found:
            return cls(
                Rows(found["ids"], found["counts"]),
                Rows(found["reference_ids"], found["reference_counts"]),
                found["retrieved"],
            )


class TrainingSequences(Dataset[dict[str, Any]]):
    """Sequences, with the references that their chunks retrieved, or without (``reading=False``: the warmup).

    Without memory a sequence begins with ``begin``, its BOS; beside memories the sink has that.
    """

    def __init__(self, prepared: Prepared, *, reading: bool, begin: int | None) -> None:
        self.prepared = prepared
        self.reading = reading
        self.begin = [] if begin is None or reading else [begin]

    def __len__(self) -> int:
        return len(self.prepared.sequences)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example: dict[str, Any] = {"ids": [*self.begin, *self.prepared.sequences.row(index).tolist()]}
        if self.reading:
            example["retrieved"] = self.prepared.retrieved[index]
        return example

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch as `Memory3ForCausalLM.forward` takes it, padded to the longest sequence and reference."""
        counts = torch.tensor([len(example["ids"]) for example in examples])
        width = int(counts.max())
        ids = torch.tensor([example["ids"] + [0] * (width - len(example["ids"])) for example in examples])
        there = torch.arange(width) < counts[:, None]
        batch = {"input_ids": ids, "attention_mask": there.long(), "labels": ids.masked_fill(~there, NO_LABEL)}
        if not self.reading:
            return batch
        retrieved = np.stack([example["retrieved"] for example in examples])
        lengths = np.where(retrieved == NOTHING, 0, self.prepared.references.counts[retrieved])
        chosen = self.prepared.references.ids[retrieved, : max(1, int(lengths.max()))]
        chosen = np.where(np.arange(chosen.shape[2]) < lengths[..., None], chosen, 0)
        batch["references"] = torch.from_numpy(chosen.astype(np.int64))
        batch["reference_counts"] = torch.from_numpy(lengths.astype(np.int64))
        return batch
