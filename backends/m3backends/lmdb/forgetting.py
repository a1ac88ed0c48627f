"""Forgetting, damaged records included: their traces are searched for where no record names them.

A source that loses a reference loses its state, too, so that it is read anew when it is written again.
"""

from contextlib import suppress

import numpy as np

from m3backends.lmdb.environment import ReadTransaction, WriteTransaction
from m3backends.lmdb.records import (
    SEAL_BYTES,
    Source,
    pack_expiry,
    pack_ids,
    pack_source,
    unpack_id,
    unpack_ids,
    unpack_source,
)
from m3backends.lmdb.schema import Databases
from m3backends.records import digest, identity, pack_state, unpack_reference, unpack_state
from m3runtime.documents.reference import Reference
from m3runtime.errors import RecordError
from m3runtime.memory.block import Ids


def forget(txn: WriteTransaction, db: Databases, ids: Ids) -> None:
    """Remove everything that a home has of these ids.

    For an id without a sound reference all texts and sources are searched, about a second for a million references.
    """
    lost: dict[bytes, bool] = {}
    """Maps each id whose texts and sources are to be searched for to: was there a reference?"""
    for key in pack_ids(np.unique(ids)):
        known = _forget_known(txn, db, key)
        there = db.references.delete(txn, key)
        if not known:
            lost[key] = there
        txn.delete(key, db=db.blocks)
        db.embeddings.delete(txn, key)
        db.quarantine.delete(txn, key)
        db.cold.delete(txn, key)
    if lost:
        _forget_lost(txn, db, lost)


def _forget_known(txn: WriteTransaction, db: Databases, key: bytes) -> bool:
    """Remove the entries of a reference by text and source; false unless it is sound and both were found."""
    try:
        reference = db.references.read(txn, key, unpack_reference)
    except RecordError:
        return False
    if reference is None:
        return False
    listed = [leave(txn, db, source, key) for source in reference.sources]
    listed += [db.expiring.delete(txn, expiry) for expiry in expiries(key, reference)]
    return _forget_text(txn, db, key, identity(reference)) and all(listed)


def _forget_text(txn: WriteTransaction, db: Databases, key: bytes, text: bytes) -> bool:
    try:
        if db.digests.read(txn, text, bytes) != key:
            return False
    except RecordError:
        pass  # whosever it was, nobody else has this text
    return db.digests.delete(txn, text)


def _forget_lost(txn: WriteTransaction, db: Databases, lost: dict[bytes, bool]) -> None:
    texts = [key for key, stored in txn.cursor(db.digests.handle) if stored[SEAL_BYTES:] in lost]
    for text in texts:
        db.digests.delete(txn, text)
    for source, key in [(source, key) for source, key in txn.cursor(db.members) if key in lost]:
        txn.delete(source, key, db=db.members)
        void(txn, db, source)
        _unlist(txn, db, source, unpack_id(key), counted=lost[key])
    for expiry in [key for key, _ in txn.cursor(db.expiring.handle) if key[-8:] in lost] if db.expiring.exists else ():
        db.expiring.delete(txn, expiry)


def expiries(key: bytes, reference: Reference) -> set[bytes]:
    """The keys in `expiring` of a reference."""
    return {pack_expiry(place.expires, key) for place in reference.places if place.expires}


def void(txn: WriteTransaction, db: Databases, source: bytes) -> None:
    """Remove the state of a source, but for its last day and tags."""
    known = None
    with suppress(RecordError):
        known = db.states.read(txn, source, unpack_state)
    if known is not None and known[1].has_settings:
        db.states.put(txn, source, pack_state(known[0], known[1].voided()))
    else:
        db.states.delete(txn, source)


def leave(txn: WriteTransaction, db: Databases, name: str, key: bytes) -> bool:
    """Take a reference off a source that lists it; false if it does not. A damaged record of the source is mended."""
    source = digest(name)
    listed = txn.delete(source, key, db=db.members)
    void(txn, db, source)
    try:
        known = db.sources.read(txn, source, unpack_source)
    except RecordError:
        _store(txn, db, source, Source(name, 0, 0).with_more(members_of(txn, db, source).tolist()))
    else:
        _store(txn, db, source, known and known.without(unpack_id(key)))
    return listed


def _unlist(txn: WriteTransaction, db: Databases, source: bytes, id: int, *, counted: bool) -> None:
    """Take an id off the count of a source that listed it, if it was ``counted`` or the others fit only then."""
    left = members_of(txn, db, source)
    try:
        known = db.sources.read(txn, source, unpack_source)
    except RecordError:
        if not len(left):
            db.sources.delete(txn, source)
        return
    without = known and known.without(id)
    if known and without and (without.fits(left) or (counted and not known.fits(left))):
        _store(txn, db, source, without)


def _store(txn: WriteTransaction, db: Databases, source: bytes, known: Source | None) -> None:
    if known is not None and known.count:
        db.sources.put(txn, source, pack_source(known))
    else:
        db.sources.delete(txn, source)


def members_of(txn: ReadTransaction | WriteTransaction, db: Databases, source: bytes) -> Ids:
    """The ids that a source lists, without entries that are no ids."""
    cursor = txn.cursor(db.members)
    return unpack_ids(id for id in (cursor.iternext_dup() if cursor.set_key(source) else ()) if len(id) == 8)
