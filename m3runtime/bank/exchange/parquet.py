"""Records as a Parquet file."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from m3runtime.documents.readers.opening import library, readable
from m3runtime.errors import InputError

_ROWS = 1024
"""Rows of a row group, which is in memory at a time."""


def write_parquet(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a row for each record. Raises `InputError` for a source whose name is not text, which Parquet lacks."""
    arrow, parquet = library(path, "pyarrow"), library(path, "pyarrow.parquet")
    place = arrow.struct(
        [
            ("source", arrow.string()),
            ("start", arrow.int64()),
            ("end", arrow.int64()),
            ("metadata", arrow.map_(arrow.string(), arrow.string())),
        ]
    )
    schema = arrow.schema(
        [
            ("id", arrow.uint64()),
            ("text", arrow.string()),
            ("heading", arrow.string()),
            ("tokens", arrow.int64()),
            ("places", arrow.list_(place)),
            ("embedding", arrow.list_(arrow.float32())),
            ("embedder", arrow.string()),
        ]
    )
    source = iter(records)
    with parquet.ParquetWriter(path, schema, compression="zstd") as file:
        while rows := list(islice(source, _ROWS)):
            try:
                table = arrow.Table.from_pylist([_row(row) for row in rows], schema)
            except UnicodeEncodeError as error:
                raise InputError(f"a source's name is not UTF-8: {error.object!r}; export to a .jsonl file") from error
            file.write_table(table)


def read_parquet(path: Path) -> Iterator[object]:
    """The fields of each row, some rows in memory at a time. Raises `InputError`."""
    parquet = library(path, "pyarrow.parquet")
    # A buffer of what is ahead would grow to the size of the file.
    with readable(path, "Parquet"), parquet.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(_ROWS):
            for row in batch.to_pylist():
                yield {name: value for name, value in row.items() if value is not None} | {
                    "places": [{**one, "metadata": dict(one["metadata"] or ())} for one in row.get("places") or ()]
                }


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "places": [{**place, "metadata": list(place["metadata"].items())} for place in record["places"]]}
