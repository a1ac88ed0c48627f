"""`Edit`: the additions and removals of one transaction, worked out on one version of a table."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from m3backends.lance.reader import REFERENCE, as_reference, as_vectors, keyed
from m3backends.lance.schema import (
    STATE,
    Row,
    any_of,
    named,
    opened,
    record_row,
    reference_row,
    seal_embedding,
    text_key,
    unescaped,
)
from m3backends.lance.snapshot import Change, Snapshot
from m3backends.records import pack_state, unpack_state
from m3runtime.documents.reference import Place, Reference
from m3runtime.documents.sources import SourceState
from m3runtime.errors import InputError, RecordError
from m3runtime.memory.block import Ids, as_ids


class Edit:
    """Collects what one transaction changes. Its methods raise `InputError` for what the home refuses."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.head = snapshot.head
        self._rows: list[Row] = []
        self._forgotten = set[int]()
        self._moved = set[int]()
        self._lost_marks = set[int]()
        self._voided = set[str]()
        self._states: dict[str, SourceState | None] = {}
        self._lost_keys = set[str]()

    def change(self) -> Change:
        """The change to commit."""
        self._void()
        for name, state in self._states.items():
            self._lost_keys.add(named(STATE, name))
            if state is not None:
                self._rows.append(record_row(named(STATE, name), pack_state(name, state)))
        gone: dict[str, Iterable[int | str]] = {
            "id": self._forgotten | self._moved,
            "block_id": self._forgotten,
            "mark_id": (self._forgotten | self._lost_marks) & self.snapshot.marks.keys(),
            "key": self._lost_keys,
        }
        rows = [row for row in self._rows if row.get("id") not in self._forgotten]
        return Change(rows, {column: values for column, values in gone.items() if values}, self.head)

    def forget(self, ids: Ids) -> None:
        """Remove all rows of ids. Their sources lose their states."""
        for row in self.snapshot.rows(any_of("id", np.unique(ids).tolist()), ["sources"]):
            self._voided |= {unescaped(name) for name in row["sources"] or ()}
        self._forgotten |= set(ids.tolist())

    def move(self, places: Mapping[int, tuple[Place, ...]]) -> None:
        """Give references other places, and forget those that have none."""
        rows = self._stored({id for id, new in places.items() if new} - self._forgotten)
        for id, new in places.items():
            if not new:
                continue
            if id not in rows:
                raise InputError(f"id {id} is not remembered: it can have no other places")
            row, vector = rows[id]
            old = as_reference(self.snapshot.bank, row)
            moved = Reference(old.text, old.tokens, old.heading, new)
            self._moved.add(id)
            self._rows.append(reference_row(id, moved, vector, row["embedding_seal"]))
            for name in {*old.sources, *moved.sources}:
                if old.places_in(name) != moved.places_in(name):
                    self._voided.add(name)
        self.forget(as_ids([id for id, new in places.items() if not new]))

    def add(self, ids: Ids, references: Sequence[Reference], vectors: npt.NDArray[np.float32]) -> None:
        """Add references. Raises `InputError` if the text of one is remembered."""
        keys = [text_key(reference) for reference in references]
        known = keyed(self.snapshot.rows(any_of("key", sorted(set(keys))), ["key", "id"]))
        taken = {key for key, row in known.items() if row["id"] not in self._forgotten}
        for id, key, reference, vector in zip(ids.tolist(), keys, references, vectors, strict=True):
            if key in taken:
                raise InputError(f"id {id}: its text is remembered already: {reference.text[:60]!r}")
            taken.add(key)
            self._rows.append(reference_row(id, reference, vector, seal_embedding(id, vector)))
            self._voided |= set(reference.sources)

    def add_rows(self, rows: Iterable[Row]) -> None:
        """Add other rows."""
        self._rows += rows

    def unmark(self, id: int) -> None:
        """Remove the quarantine of an id."""
        self._lost_marks.add(id)

    def drop(self, key: str) -> None:
        """Remove a record."""
        self._lost_keys.add(key)

    def state(self, states: Mapping[str, SourceState | None]) -> None:
        """Store the states of sources; None removes one."""
        self._states |= states

    def use(self, below: int, count: int) -> None:
        """Ids below this one are used, or reserved; ``count`` of them are used by this transaction."""
        next_id = max(self.head.next_id, below)
        unused = self.head.unused + next_id - self.head.next_id - count
        self.head = replace(self.head, next_id=next_id, unused=max(0, unused))

    def _stored(self, ids: Iterable[int]) -> dict[int, tuple[Row, npt.NDArray[np.float32]]]:
        """The rows of references with their embeddings."""
        if self.snapshot.dim is None:  # then there are none
            return {}
        found = self.snapshot.table(any_of("id", sorted(ids)), [*REFERENCE, "embedding_seal", "embedding"])
        vectors = as_vectors(found["embedding"], self.snapshot.dim)
        rows = found.drop_columns(["embedding"]).to_pylist()
        return {row["id"]: (row, vector) for row, vector in zip(rows, vectors, strict=True)}

    def _void(self) -> None:
        """Remove the states of sources that changed and are not stated anew, but for their last days and tags."""
        voided = self._voided - self._states.keys()
        rows = (
            keyed(
                self.snapshot.rows(
                    any_of("key", [named(STATE, name) for name in sorted(voided)]), ["key", "value", "seal"]
                )
            )
            if voided
            else {}
        )
        for name in voided:
            if (row := rows.get(named(STATE, name))) is not None:
                self._states[name] = None
                with suppress(RecordError, ValueError):
                    _, state = unpack_state(opened(self.snapshot.bank, row, "state"))
                    self._states[name] = state.voided() if state.has_settings else None
