"""`TableFolder`: the files of a table on a folder: fsync, which Lance leaves out, recovery, and locks.

::

    data/             rows and blocks
    _deletions/       which rows of a file are gone
    _indices/         scalar and vector indexes
    _versions/        a manifest for each version, named so that the newest comes first
    _transactions/    what each version changed
    changing.lock     shared by whoever writes files for a transaction, held alone while strays are removed
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from m3backends.lance.library import lance
from m3runtime.errors import BankError
from m3runtime.storage.files import sync_folder

if os.name == "posix":
    import fcntl

_LAST = 2**64 - 1
_MANIFEST_END = b"LANC"


class TableFolder:
    """A folder that holds a table. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = path / "changing.lock"

    def manifest(self, version: int) -> Path:
        """The manifest of a version."""
        return self.path / "_versions" / f"{_LAST - version:020d}.manifest"

    def exists(self) -> bool:
        """Is there a table?"""
        versions = self.path / "_versions"
        return versions.is_dir() and any(versions.glob("*.manifest*"))

    @contextmanager
    def changing(self, *, alone: bool = False) -> Iterator[None]:
        """Hold the lock of whoever writes files, ``alone`` or with others. Waits for other processes."""
        if os.name != "posix":
            yield
            return
        handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield
        finally:
            os.close(handle)

    def files(self) -> set[Path]:
        """All files but the lock."""
        return {path for path in self.path.rglob("*") if path != self._lock and path.is_file()}

    def stored_bytes(self) -> int:
        """Bytes of all files."""
        total = 0
        for path in self.files():
            with suppress(FileNotFoundError):  # cleaned up meanwhile
                total += path.stat().st_size
        return total

    def sync(self, paths: Iterable[Path]) -> None:
        """Make files durable, and the folders that name them. Raises `OSError`."""
        folders = {self.path}
        for path in paths:
            with suppress(FileNotFoundError):  # another replaced it, as the hint is
                file = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(file)
                finally:
                    os.close(file)
            folders.add(path.parent)
        for folder in folders:
            with suppress(FileNotFoundError):
                sync_folder(folder)

    def of_version(self, version: int) -> list[Path]:
        """The manifest of a version, the hint that names it, and the record of its transaction."""
        records = (self.path / "_transactions").glob(f"{version - 1}-*.txn")
        return [self.manifest(version), self.path / "_versions" / "latest_version_hint.json", *records]

    def remove_remains(self) -> None:
        """Remove temporary files of processes that were killed. Only for who holds `changing` alone."""
        for remains in self.path.rglob(".tmp*"):
            remains.unlink(missing_ok=True)

    def is_cut(self) -> bool:
        """Is the newest manifest empty or cut? Lance takes one of zeros for an empty table."""
        manifests = self._manifests()
        return bool(manifests) and not _ends_well(manifests[0])

    def recover(self) -> None:
        """Set aside the newest manifests that a power cut left empty or cut, so that the version before is opened.

        Their commits had not returned, for a commit returns after its manifest is on the drive. Raises `BankError` if
        no version is left.
        """
        with self.changing(alone=True):
            manifests = self._manifests()
            whole = next((at for at, path in enumerate(manifests) if self._is_whole(path)), None)
            if whole is None:
                raise BankError(
                    f"bank {self.path} is damaged: no manifest of its table is whole; restore it from a copy"
                )
            for path in manifests[:whole]:
                path.replace(path.with_name(f"{path.name}.cut"))
            (self.path / "_versions" / "latest_version_hint.json").unlink(missing_ok=True)
            sync_folder(self.path / "_versions")

    def _manifests(self) -> list[Path]:
        """All manifests, the newest first."""
        return sorted((self.path / "_versions").glob("*.manifest"))

    def _is_whole(self, manifest: Path) -> bool:
        if not _ends_well(manifest):
            return False
        try:
            lance.dataset(str(self.path), version=_LAST - int(manifest.name.partition(".")[0]))
        except (OSError, ValueError, RuntimeError):
            return False
        return True


def _ends_well(manifest: Path) -> bool:
    with manifest.open("rb") as file:
        file.seek(max(0, manifest.stat().st_size - len(_MANIFEST_END)))
        return file.read() == _MANIFEST_END
