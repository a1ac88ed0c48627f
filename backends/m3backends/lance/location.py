"""`Location`: the place of a table, how it is made and opened there, and the files that a transaction makes durable."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from m3backends.lance.folder import TableFolder
from m3backends.lance.library import lance, reason
from m3backends.lance.schema import ANCHOR, FILE_FORMAT, Head, as_table, record_row
from m3runtime.errors import BankError, BankMissingError

INDEX_CACHE = 512 << 20
_METADATA_CACHE = 128 << 20
"""Bytes of what Lance knows of files: footers, row ids, deletions."""


class Location:
    """A table at a ``uri``. Thread-safe."""

    def __init__(self, uri: str, *, durable: bool, index_cache: int = INDEX_CACHE) -> None:
        """``durable``: files are synced. ``index_cache``: most bytes of indexes in memory, for all versions."""
        self.uri = uri
        # Without a session of ours each version would begin with empty caches, of up to 7 GB.
        self._session = lance.Session(  # type: ignore[attr-defined]  # public, and documented
            index_cache_size_bytes=index_cache, metadata_cache_size_bytes=_METADATA_CACHE
        )
        self.folder = None if "://" in uri else TableFolder(Path(uri))
        self._durable = durable

    def open(self, slot_bytes: int | None, *, read_only: bool) -> Any:
        """The dataset, made if it is missing. Raises `BankMissingError` and `BankError`."""
        try:
            if not self._exists():
                if read_only or slot_bytes is None:
                    raise BankMissingError(f"there is no bank at {self.uri}")
                self._create(slot_bytes)
            return self._opened(read_only)
        except OSError as error:
            raise BankError(f"bank {self.uri} cannot be opened: {error}") from error

    def dataset(self) -> Any:
        """The newest version."""
        return lance.dataset(self.uri, session=self._session)

    def stored_bytes(self, dataset: Any) -> int:
        """Bytes of all files, or of those of a version where they cannot be listed."""
        if self.folder is not None:
            return self.folder.stored_bytes()
        return sum(one["size_bytes"] for one in dataset.all_files().read_all().to_pylist())

    def changing(self, *, alone: bool = False) -> AbstractContextManager[None]:
        """Hold the lock of whoever writes files; see `TableFolder.changing`."""
        return self.folder.changing(alone=alone) if self.folder else nullcontext()

    def sync_fragments(self, fragments: Iterable[Any]) -> None:
        """Make the files of fragments durable, which are in no version yet. Raises `OSError`."""
        if self.folder is None or not self._durable:
            return
        found = list[Path]()
        for fragment in fragments:
            if fragment.deletion_file is not None:
                found.append(self.folder.path / fragment.deletion_file.path(fragment.id))
                continue
            for file in fragment.files:
                data = self.folder.path / "data" / file.path
                found += [data, *data.with_suffix("").glob("*")]
        self.folder.sync(found)

    def sync_version(self, version: int) -> None:
        """Make a version durable, whose fragments are. Raises `OSError`."""
        if self.folder is not None and self._durable:
            self.folder.sync(self.folder.of_version(version))

    def sync_all(self, but: Iterable[Path] = ()) -> None:
        """Make all files durable but these, which are. Raises `OSError`."""
        if self.folder is not None and self._durable:
            self.folder.sync(self.folder.files().difference(but))

    def _opened(self, read_only: bool) -> Any:
        """The newest version, after a power cut the newest that is whole."""
        try:
            if self.folder is not None and self.folder.is_cut():
                raise ValueError("its newest manifest is cut")
            return self.dataset()
        except (OSError, ValueError, RuntimeError) as error:
            if self.folder is None:
                raise
            if read_only:
                raise BankError(
                    f"bank {self.uri} cannot be opened: {reason(error)}; if a power cut left it so, opening it for "
                    "writing sets aside what was cut"
                ) from error
            self.folder.recover()
            return self.dataset()

    def _exists(self) -> bool:
        if self.folder is not None:
            return self.folder.exists()
        try:
            self.dataset()
        except ValueError as error:
            if "not found" in str(error).lower():
                return False
            raise
        return True

    def _create(self, slot_bytes: int) -> None:
        if self.folder is not None:
            self.folder.path.mkdir(parents=True, exist_ok=True)
        try:
            lance.write_dataset(
                as_table([record_row(ANCHOR, b""), Head(0, slot_bytes).row()], None),
                self.uri,
                mode="create",
                max_rows_per_file=1,  # a fragment for each
                data_storage_version=FILE_FORMAT,
                enable_stable_row_ids=True,
                enable_v2_manifest_paths=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            if "exists" not in str(error):  # another was first
                raise
        if self.folder is not None:
            self.sync_all()
            self.folder.sync([self.folder.path])  # its name, in the folder above
