"""The rows of a home's table, and their seals.

Each row is of one kind, by the column that it has:

=============  ==========================================================================================
a row with     is
=============  ==========================================================================================
``id``         a reference: its packed form in ``value``, its text's digest in ``key``, its embedding
``block_id``   the block of that id
``mark_id``    the quarantine of that id; ``value`` is the reason
``key`` alone  a record: ``head``, or ``anchor``, or ``meta:`` or ``state:`` and a name
=============  ==========================================================================================

A row never changes: another takes its place, so a change of a reference's places leaves its block alone.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import quote, unquote_to_bytes

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from m3backends.lance.library import lance
from m3backends.records import identity, pack_reference, pack_text, unpack_text
from m3runtime.documents.reference import Reference
from m3runtime.errors import BankFormatError, RecordError

FORMAT = 1
ANCHOR, HEAD = "anchor", "head"
META, STATE, TEXT = "meta:", "state:", "text:"
FILE_FORMAT: Literal["2.2"] = "2.2"
"""The version of Lance's files: the first with blobs."""

Row = dict[str, Any]

_FIELDS = [
    pa.field("key", pa.string()),
    pa.field("id", pa.uint64()),
    pa.field("block_id", pa.uint64()),
    pa.field("mark_id", pa.uint64()),
    pa.field("value", pa.large_binary()),
    pa.field("seal", pa.uint64()),
    pa.field("sources", pa.list_(pa.string())),
    pa.field("expires", pa.list_(pa.string())),
    pa.field("embedding_seal", pa.uint64()),
    lance.blob_field("block"),
]


def embedding_field(dim: int) -> pa.Field:
    """The column of embeddings, which a table gets with its first reference."""
    return pa.field("embedding", pa.list_(pa.float32(), dim))


def table_schema(dim: int | None) -> pa.Schema:
    """The columns of a table with embeddings of this length, or without any so far."""
    return pa.schema(_FIELDS if dim is None else [*_FIELDS, embedding_field(dim)])


def dim_of(schema: pa.Schema) -> int | None:
    """The length of the embeddings of a table; None if it has had none."""
    return int(schema.field("embedding").type.list_size) if "embedding" in schema.names else None


def as_table(rows: Sequence[Row], dim: int | None) -> pa.Table:
    """The rows as an Arrow table."""
    schema = table_schema(dim)
    columns = [
        lance.blob_array(values) if field.name == "block" else pa.array(values, field.type)
        for field in schema
        for values in [[row.get(field.name) for row in rows]]
    ]
    return pa.Table.from_arrays(columns, schema=schema)


# Names


def named(kind: str, name: str) -> str:
    """The key of a record of this kind, in ASCII: names may hold lone surrogates."""
    return kind + escaped(name)


def escaped(name: str) -> str:
    """A name in ASCII, without quotation marks."""
    return quote(pack_text(name), safe="/ :,()[]")


def unescaped(name: str) -> str:
    """The name that `escaped` wrote. Raises `ValueError` for another text."""
    return unpack_text(unquote_to_bytes(name))


def text_key(reference: Reference) -> str:
    """The key of a reference: the digest of its text and heading."""
    return TEXT + identity(reference).hex()


# Rows


def reference_row(id: int, reference: Reference, embedding: npt.NDArray[np.float32], embedding_seal: int) -> Row:
    """The row of a reference."""
    listed = {
        "sources": [escaped(source) for source in reference.sources],
        "expires": sorted({place.expires for place in reference.places if place.expires}) or None,
    }
    row = _sealed({"key": text_key(reference), "id": id, "value": pack_reference(reference), **listed})
    return {**row, "embedding": embedding, "embedding_seal": embedding_seal}


def block_row(id: int, block: bytes) -> Row:
    """The row of a block, which has a digest of its own."""
    return {"block_id": id, "block": block}


def mark_row(id: int, why: str) -> Row:
    """The row of a quarantine."""
    return _sealed({"mark_id": id, "value": pack_text(why)})


def record_row(key: str, value: bytes) -> Row:
    """The row of a record."""
    return _sealed({"key": key, "value": value})


def _sealed(row: Row) -> Row:
    return {**row, "seal": seal(row)}


def seal(row: Mapping[str, Any]) -> int:
    """XXH3-64 over a row, but for its embedding. All columns are needed that it has."""
    small = [row.get(name) for name in ("key", "id", "mark_id", "sources", "expires")]
    return xxhash.xxh3_64_intdigest(repr(small).encode() + b"\0" + (row["value"] or b""))


def seal_embedding(id: int, embedding: npt.NDArray[np.float32]) -> int:
    """XXH3-64 over an id and the little-endian bytes of its embedding."""
    return xxhash.xxh3_64_intdigest(b"%d\0" % id + embedding.astype("<f4").tobytes())


def opened(bank: str, row: Mapping[str, Any], what: str) -> bytes:
    """The value of a row, after its seal was checked. Raises `RecordError`."""
    if row["value"] is None or seal(row) != row["seal"]:
        id = next((row[name] for name in ("id", "mark_id") if row.get(name) is not None), None)
        shown = id if id is not None else row.get("key")
        raise RecordError(f"bank {bank}: the {what} of {shown} is damaged: its digest does not match", id)
    return bytes(row["value"])


# Filters


def any_of(column: str, wanted: Iterable[int | str]) -> str:
    """A filter for rows whose column has one of these values, or none if there are none."""
    texts = [f"'{one}'" if isinstance(one, str) else str(one) for one in wanted]
    return f"{column} in ({','.join(texts)})" if texts else "false"


# The head


@dataclass(frozen=True, slots=True)
class Head:
    """The state of a table as a whole. Every transaction writes it anew."""

    next_id: int
    slot_bytes: int
    unused: int = 0
    """Ids below ``next_id`` that were reserved and not used, or passed over."""

    def row(self) -> Row:
        """Its row."""
        return record_row(HEAD, json.dumps({"format": FORMAT, **asdict(self)}).encode())

    @classmethod
    def of(cls, bank: str, row: Mapping[str, Any]) -> "Head":
        """The head in a row. Raises `RecordError` and `BankFormatError`."""
        about = json.loads(opened(bank, row, "record"))
        if about.get("format") != FORMAT:
            raise BankFormatError(
                f"bank {bank} has format {about.get('format')} of its table, and this release reads {FORMAT}"
            )
        return cls(about["next_id"], about["slot_bytes"], about.get("unused", 0))
