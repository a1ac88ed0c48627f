"""Places of references, and states of their sources, within a transaction."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from m3backends.lmdb.environment import WriteTransaction
from m3backends.lmdb.forgetting import expiries, forget, leave, void
from m3backends.lmdb.records import (
    Source,
    pack_id,
    pack_source,
    unpack_source,
)
from m3backends.lmdb.schema import Databases
from m3backends.records import digest, pack_reference, pack_state, unpack_reference
from m3runtime.documents.reference import Place
from m3runtime.documents.sources import SourceState
from m3runtime.errors import InputError
from m3runtime.memory.block import as_ids


def move(txn: WriteTransaction, db: Databases, places: Mapping[int, tuple[Place, ...]]) -> None:
    """Give references other places, and forget those that have none. Raises `InputError` for an unknown id."""
    joined: dict[str, list[int]] = {}
    for id, new in places.items():
        if not new:
            continue
        key = pack_id(id)
        old = db.references.read(txn, key, unpack_reference)
        if old is None:
            raise InputError(f"id {id} is not remembered: it can have no other places")
        moved = replace(old, places=new)
        db.references.put(txn, key, pack_reference(moved))
        before, after = expiries(key, old), expiries(key, moved)
        for expiry in before - after:
            db.expiring.delete(txn, expiry)
        for expiry in after - before:
            db.expiring.put(txn, expiry, b"")
        for name in set(old.sources) - set(moved.sources):
            leave(txn, db, name, key)
        for name in moved.sources:
            if old.places_in(name) != moved.places_in(name):
                joined.setdefault(name, []).extend([] if name in old.sources else [id])
    join(txn, db, joined)
    forget(txn, db, as_ids([id for id, new in places.items() if not new]))


def join(txn: WriteTransaction, db: Databases, members: Mapping[str, Iterable[int]]) -> None:
    """List references with their sources, whose states no longer hold."""
    for name, ids in members.items():
        source, more = digest(name), list(ids)
        void(txn, db, source)
        for id in more:
            txn.put(source, pack_id(id), db=db.members)
        if more:
            known = db.sources.read(txn, source, unpack_source) or Source(name, 0, 0)
            db.sources.put(txn, source, pack_source(known.with_more(more)))


def state(txn: WriteTransaction, db: Databases, states: Mapping[str, SourceState | None]) -> None:
    """Store the states of sources; None removes one."""
    for name, one in states.items():
        if one is None:
            db.states.delete(txn, digest(name))
        else:
            db.states.put(txn, digest(name), pack_state(name, one))
