"""`commit`: one transaction on a table, which is refused if another came first.

Lance rebases a commit on others that came meanwhile, unless both change the same fragment of rows. So every
transaction claims the first fragment of the table, the **anchor**, which holds one row and never changes. Of two
transactions that began at the same version only one wins, however long the other was stopped: it is refused, reads the
newest version, checks everything anew and tries again. Compaction keeps the newest version that claimed the
anchor: a refusal needs the record of what came before.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from m3backends.lance.library import FAULTS, lance
from m3backends.lance.location import Location
from m3backends.lance.schema import FILE_FORMAT, HEAD, Row, any_of, as_table, table_schema
from m3backends.lance.snapshot import Change, Snapshot

ROWS = 20_000
"""Most rows of a fragment. Compaction rewrites whole fragments."""


def commit(location: Location, snapshot: Snapshot, change: Change) -> Any:
    """Commit a change of a version. Returns the new one.

    Raises what `is_conflict` knows if the version is no longer the newest one.
    """
    dataset = snapshot.dataset
    removed, updated = _without(snapshot, change.gone)
    added = _written(location, change.rows, snapshot.dim)
    added += _written(location, [(change.head or snapshot.head).row()], snapshot.dim)  # the last fragment of all
    location.sync_fragments([*added, *updated])
    anchor = dataset.get_fragments()[0].metadata
    update = lance.LanceOperation.Update(removed, updated_fragments=[anchor, *updated], new_fragments=added)
    transaction = lance.Transaction(snapshot.version, update)
    try:
        return lance.LanceDataset.commit(dataset, transaction, max_retries=0)
    except FAULTS as error:
        if location.folder is None and (made := _landed(location, transaction)) is not None:
            return made
        raise error


def _landed(location: Location, transaction: Any) -> Any:
    """The version that a transaction made although its commit failed: the store did it, and its answer was lost."""
    newest = location.dataset()
    for version in range(transaction.read_version + 1, newest.version + 1):
        try:
            if newest.read_transaction(version).uuid == transaction.uuid:
                return newest
        except (OSError, ValueError, RuntimeError):  # cleaned up
            continue
    return None


def _without(snapshot: Snapshot, gone: Mapping[str, Iterable[int | str]]) -> tuple[list[int], list[Any]]:
    """The fragments that lose all of their rows, the head among them, and the new state of those that lose some."""
    filters = [any_of(column, values) for column, values in gone.items()]
    addresses = {snapshot.head_address}
    for where in filters:  # each by itself, so that each may use an index
        addresses |= set(snapshot.table(where, [], with_row_address=True)["_rowaddr"].to_pylist())
    everything = " or ".join([f"key = '{HEAD}'", *filters])
    removed, updated = list[int](), list[Any]()
    for number in sorted({address >> 32 for address in addresses}):
        left = snapshot.dataset.get_fragment(number).delete(everything)
        if left is None:
            removed.append(number)
        else:
            updated.append(left)
    return removed, updated


def _written(location: Location, rows: list[Row], dim: int | None) -> list[Any]:
    """Uncommitted fragments of rows."""
    if not rows:
        return []
    written = lance.fragment.write_fragments(
        as_table(rows, dim),
        location.uri,
        schema=table_schema(dim),
        mode="append",
        max_rows_per_file=ROWS,
        data_storage_version=FILE_FORMAT,
        enable_stable_row_ids=True,
    )
    return list(written)
