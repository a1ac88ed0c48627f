"""Forgetting, also what is damaged: its traces are looked for where they cannot be known."""

import numpy as np

from m3backends.lmdb_environment import Writing
from m3backends.lmdb_records import (
    SEAL_BYTES,
    Source,
    digest,
    pack_ids,
    pack_source,
    unpack_id,
    unpack_ids,
    unpack_reference,
    unpack_source,
)
from m3backends.lmdb_schema import Databases
from m3runtime.block import Ids
from m3runtime.errors import RecordError
from m3runtime.tier import Reference


def forget(txn: Writing, db: Databases, ids: Ids) -> None:
    """Remove all that a home has of these ids. Of an id without a sound reference, every text and source is looked at.

    That takes about a second for each million references.
    """
    lost = set[bytes]()
    for key in pack_ids(np.unique(ids)):
        if not _forget_known(txn, db, key):
            lost.add(key)
        db.references.delete(txn, key)
        txn.delete(key, db=db.blocks)
        db.embeddings.delete(txn, key)
        db.quarantine.delete(txn, key)
    if lost:
        _forget_lost(txn, db, lost)


def _forget_known(txn: Writing, db: Databases, key: bytes) -> bool:
    """Remove the entries of a reference by text and source; false unless the reference and both were there."""
    try:
        reference = db.references.read(txn, key, unpack_reference)
    except RecordError:
        return False
    return reference is not None and all(
        [_forget_text(txn, db, key, reference), _forget_member(txn, db, key, reference)]
    )


def _forget_text(txn: Writing, db: Databases, key: bytes, reference: Reference) -> bool:
    text = digest(reference.text)
    try:
        if db.digests.read(txn, text, bytes) != key:
            return False
    except RecordError:
        pass  # whosever it was, nobody else has this text
    return db.digests.delete(txn, text)


def _forget_member(txn: Writing, db: Databases, key: bytes, reference: Reference) -> bool:
    source = digest(reference.source)
    if not txn.delete(source, key, db=db.members):
        return False
    _count_without(txn, db, source, key, reference.source)
    return True


def _forget_lost(txn: Writing, db: Databases, lost: set[bytes]) -> None:
    texts = [key for key, stored in txn.cursor(db.digests.handle) if stored[SEAL_BYTES:] in lost]
    for text in texts:
        db.digests.delete(txn, text)
    members = [(source, key) for source, key in txn.cursor(db.members) if key in lost]
    for source, key in members:
        txn.delete(source, key, db=db.members)
        _count_without(txn, db, source, key, None)


def _count_without(txn: Writing, db: Databases, source: bytes, key: bytes, name: str | None) -> None:
    """Take one reference off a source's count, or forget it with its last. ``name``, where known, mends its record."""
    members = txn.cursor(db.members)
    if not members.set_key(source):
        db.sources.delete(txn, source)
        return
    try:
        known = db.sources.read(txn, source, unpack_source)
    except RecordError:
        known = None
    if known is not None:
        db.sources.put(txn, source, pack_source(known.with_less(unpack_id(key))))
    elif name is not None:
        left = unpack_ids(members.iternext_dup())
        db.sources.put(txn, source, pack_source(Source(name, 0, 0).with_more(left.tolist())))
