"""`BankIndex`: the upkeep of one of a bank's indexes, which is loaded from its file or rebuilt from the home.

The home's record of the file's name, ``index`` or ``lexical``, states the index's kind and dtype, and the file's length
and BLAKE2b digest. A library trusts the counts and offsets in an index that it reads, so it is given only a file that
the record vouches for. In every other case (no record, another digest, another kind) the index is rebuilt from the
home's embeddings or texts.

A `HomeIndex` has neither file nor record: the home keeps it.
"""

import json
import logging
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from m3runtime.bank import records
from m3runtime.bank.bank import Bank
from m3runtime.errors import IndexFileError, RecordError
from m3runtime.memory.block import Ids, as_ids, distinct, without
from m3runtime.memory.spec import canonical_json
from m3runtime.retrieval.derived import Derived
from m3runtime.retrieval.index import Index
from m3runtime.retrieval.lexical import LexicalIndex
from m3runtime.storage.files import open_regular, remove_remains, write_atomically
from m3runtime.storage.home_index import HomeIndex

INDEX = "index"
LEXICAL = "lexical"
_PIECE = 1 << 24
_BATCH = 4096
_NONE = as_ids(())

log = logging.getLogger("m3runtime")
D = TypeVar("D", bound=Derived)


class BankIndex(Generic[D]):
    """Loads, rebuilds and saves an index of one bank. One call at a time."""

    def __init__(self, bank: Bank, make: Callable[[], D], *, kind: str, dtype: str, name: str = INDEX) -> None:
        """``make`` makes an empty index. One of another ``kind`` or ``dtype`` is rebuilt. ``name`` is its file's."""
        self.path = bank.path / name
        self._record = name
        self._bank = bank
        self._make = make
        self._kind, self._dtype = kind, dtype

    def open(self, *, cold: bool, hidden: Ids = _NONE) -> tuple[D, bool]:
        """The index in line with the home; true if it differs from its file, which `save` then replaces.

        Without ``cold`` it finds no cold references, and it finds none that are ``hidden``.
        """
        rebuilt = False
        if isinstance(of_home := self._new(), HomeIndex):
            catch_up(of_home, self._bank, cold=cold, hidden=hidden)
            return of_home, False
        try:
            index = self.load()
        except IndexFileError as error:
            log.info("the index is rebuilt: %s", error)
            index, rebuilt = self._make(), True
        added, removed = catch_up(index, self._bank, cold=cold, hidden=hidden)
        return index, rebuilt or added + removed > 0

    def update(self) -> None:
        """Bring the file in line with the home, cold references included.

        Raises `IndexFileError` if it cannot be written, `BankFullError` and `TierReadOnlyError`.
        """
        if isinstance(of_home := self._new(), HomeIndex):
            of_home.update()
            return
        index, changed = self.open(cold=True)
        if changed:
            self.save(index)

    def rebuild(self) -> None:
        """Make the file anew from the home, cold references included: an index keeps bytes of what it removed.

        What a process that was killed left of a file is removed. Raises the errors of `update`.
        """
        index = self._new()
        if isinstance(index, HomeIndex):
            index.rebuild()
            return
        catch_up(index, self._bank)
        self._remove(keep=True)
        self.save(index)

    def drop(self) -> None:
        """Remove the file, which is rebuilt when it is needed. Raises `IndexFileError`."""
        self._remove(keep=False)

    def _remove(self, *, keep: bool) -> None:
        try:
            remove_remains(self.path)
            if not keep:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise IndexFileError(f"cannot remove what is left of index {self.path}: {error.strerror}") from error

    def load(self) -> D:
        """The index as its file has it. Raises `IndexFileError` if the file is missing or does not match its record.

        The file is mapped, not copied, so this takes the memory of the index and no more.
        """
        if isinstance(of_home := self._new(), HomeIndex):
            catch_up(of_home, self._bank)
            return of_home
        stated = self._stated()
        try:
            with open_regular(self.path) as file:
                size = os.fstat(file.fileno()).st_size
                if size != stated["bytes"]:
                    raise IndexFileError(f"{self.path} has {size} bytes, and its record states {stated['bytes']}")
                # Mapped, so that the bytes that were verified are read, whatever file is renamed to this path.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise IndexFileError(f"cannot read index {self.path}: {error.strerror}") from error
        data = memoryview(mapped)
        if blake2b(data, digest_size=32).hexdigest() != stated["digest"]:
            raise IndexFileError(f"{self.path} is damaged: its digest is not the one in its record")
        index = self._make()
        index.load(data)
        return index

    def save(self, index: D) -> None:
        """Write the file and then its record. A crash in between leaves a file to be rebuilt, never a wrong one.

        A `HomeIndex` is brought up to date. Raises `IndexFileError` if the file cannot be written; the old
        one stays then. Raises `BankFullError` and `TierReadOnlyError` for the record.
        """
        if isinstance(index, HomeIndex):
            index.update()
            return
        about: dict[str, object] = {"kind": self._kind, "dtype": self._dtype}

        def write(temporary: Path) -> None:
            index.save(temporary)
            digest = blake2b(digest_size=32)
            with temporary.open("rb") as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
                about["bytes"] = file.tell()
            about["digest"] = digest.hexdigest()

        try:
            write_atomically(self.path, write)
        except OSError as error:
            raise IndexFileError(f"cannot write index {self.path}: {error.strerror}") from error
        self._bank.home.set_meta(self._record, canonical_json(about).encode())

    def _new(self) -> D:
        """An empty index, of the home if it is a `HomeIndex`."""
        index = self._make()
        if isinstance(index, HomeIndex):
            index.attach(self._bank.home)
        return index

    def _stated(self) -> dict[str, object]:
        """The record of the file. Raises `IndexFileError` if there is none, or one of another kind or dtype."""
        try:
            value = self._bank.home.get_meta(self._record)
            if value is None:
                raise IndexFileError(f"the bank has no record of {self.path}")
            stated = json.loads(value)
        except (RecordError, ValueError, RecursionError) as error:
            raise IndexFileError(f"the record of {self.path} is damaged: {error}") from error
        kinds = {"kind": str, "dtype": str, "bytes": int, "digest": str}
        if not isinstance(stated, dict) or {key: type(value) for key, value in stated.items()} != kinds:
            raise IndexFileError(f"the record of {self.path} is damaged: it has other fields")
        for key, ours in (("kind", self._kind), ("dtype", self._dtype)):
            if stated[key] != ours:
                raise IndexFileError(f"{self.path} is of {key} {stated[key][:100]!r}, not {ours!r}")
        return stated


def catch_up(index: Derived, bank: Bank, *, cold: bool = True, hidden: Ids = _NONE) -> tuple[int, int]:
    """Bring an index in line with the home, the only truth. Returns how many ids were added and removed.

    Without ``cold`` it holds no cold references, and none of those that are ``hidden``; leaving them out does not count
    as removing. Memories whose embedding or text is damaged or missing cannot be found: they are quarantined.
    """
    hidden = hidden if cold else distinct(np.concatenate([hidden, bank.home.cold()]))
    held, wanted = index.ids(), bank.home.ids()  # each id once: numpy need not find that out, which takes seconds
    gone, missing = without(held, wanted), without(without(wanted, held), hidden)
    index.remove(np.concatenate([gone, np.intersect1d(held, hidden, assume_unique=True)]))
    if isinstance(index, HomeIndex):
        index.hold(missing)
        return len(missing), len(gone)
    damaged: dict[int, str] = {}
    if isinstance(index, Index):
        for ids, vectors in records.embeddings(bank.home, missing, bank.manifest.dim, damaged):
            index.add(ids, vectors)
    elif isinstance(index, LexicalIndex):
        for ids, texts in _texts(bank, missing, damaged):
            index.add(ids, texts)
    records.set_apart(bank.home, damaged)
    return len(missing) - len(damaged), len(gone)


def _texts(bank: Bank, ids: Ids, damaged: dict[int, str]) -> Iterator[tuple[Ids, Sequence[str]]]:
    """The texts of ids under their headings, in batches. The damage of the others is put into ``damaged``."""
    for start in range(0, len(ids), _BATCH):
        some = ids[start : start + _BATCH]
        found, wrong = records.references(bank.home, some)
        damaged |= wrong
        known = [one is not None for one in found]
        yield some[known], [one.headed for one in found if one is not None]
