"""`Snapshot`: one version of a table; and `Change`, the difference that one transaction makes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from m3backends.lance.schema import HEAD, Head, Row, dim_of, opened
from m3backends.records import unpack_text
from m3runtime.errors import TierError
from m3runtime.memory.block import Ids


@dataclass(frozen=True, slots=True)
class Change:
    """The rows that one transaction adds and removes."""

    rows: list[Row] = field(default_factory=list)
    gone: Mapping[str, Iterable[int | str]] = field(default_factory=dict)
    """Rows are gone whose column has one of these values."""
    head: Head | None = None
    """The head from now on; None: as it is."""


class Snapshot:
    """One version of a table. Thread-safe."""

    def __init__(self, bank: str, dataset: Any) -> None:
        self.bank = bank
        self.dataset = dataset
        self.version = int(dataset.version)
        self.members: dict[str, Ids] = {}
        """The ids of sources that were asked for."""

    def rows(self, where: str, columns: list[str]) -> list[Row]:
        """These columns of the rows that a filter passes."""
        rows: list[Row] = self.table(where, columns).to_pylist()
        return rows

    def table(self, where: str, columns: list[str], **options: Any) -> pa.Table:
        """The same as an Arrow table."""
        return self.dataset.scanner(columns=columns, filter=where, **options).to_table()

    @property
    def dim(self) -> int | None:
        """The length of embeddings, or None for a table that has had none."""
        return dim_of(self.dataset.schema)

    @cached_property
    def row_count(self) -> int:
        """The number of rows of all kinds."""
        return int(self.dataset.count_rows())

    @property
    def is_empty(self) -> bool:
        """Has nothing been stored yet?"""
        return self.row_count == 2  # the anchor and the head

    @cached_property
    def block_field(self) -> int:
        """The number of the column of blocks in data files."""
        return next(int(field.id()) for field in self.dataset.lance_schema.fields() if field.name() == "block")

    @property
    def head(self) -> Head:
        """The head. Raises `TierError` unless there is just one."""
        return self._head[0]

    @property
    def head_address(self) -> int:
        """The place of the head's row: its fragment in the upper 32 bits."""
        return self._head[1]

    @cached_property
    def _head(self) -> tuple[Head, int]:
        last = self.dataset.get_fragments()[-1:]  # it is there, unless the table was compacted by another program
        found = self._heads(fragments=last) or self._heads()
        if len(found) != 1:
            raise TierError(f"bank {self.bank} is damaged: its table has {len(found)} heads; restore it from a copy")
        return Head.of(self.bank, found[0]), found[0]["_rowaddr"]

    def _heads(self, **options: Any) -> list[Row]:
        columns = ["key", "value", "seal"]
        rows: list[Row] = self.table(f"key = '{HEAD}'", columns, with_row_address=True, **options).to_pylist()
        return rows

    @cached_property
    def marks(self) -> Mapping[int, str]:
        """The quarantined ids and the reasons."""
        rows = self.rows("mark_id is not null", ["mark_id", "value", "seal"])
        return {row["mark_id"]: unpack_text(opened(self.bank, row, "quarantine")) for row in rows}
