"""Files of records, in the format that their suffix names."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from m3runtime.bank.exchange import lines
from m3runtime.bank.exchange.parquet import read_parquet, write_parquet
from m3runtime.bank.exchange.record import Record, from_mapping, to_mapping
from m3runtime.errors import InputError
from m3runtime.storage.files import write_atomically

PARQUET = ".parquet"


def format_of(path: Path) -> str:
    """The suffix that names the format of a file. Raises `InputError` for another suffix."""
    known = (*lines.SUFFIXES, PARQUET)
    found = next((suffix for suffix in known if path.name.lower().endswith(suffix)), None)
    if found is None:
        raise InputError(f"{path}: name a file that ends in {', '.join(known)}")
    return found


def write_records(path: Path, records: Iterable[tuple[int, Record]]) -> None:
    """Write records with their ids, whole or not at all, in bounded memory. Raises `InputError` and `OSError`."""
    format = format_of(path)
    fields = (to_mapping(record, id) for id, record in records)
    write = write_parquet if format == PARQUET else partial(lines.write_lines, packing=format)
    write_atomically(path, lambda temporary: write(temporary, records=fields))


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file in bounded memory; see `from_mapping`. Raises `InputError`, at once for the suffix."""
    format = format_of(path)
    found = read_parquet(path) if format == PARQUET else lines.read_lines(path, format)
    return (from_mapping(fields, path.as_posix(), number) for number, fields in enumerate(found, 1))
