"""The oracle for what is on the drive tells what was synced from what was not."""

import os
from pathlib import Path

import pytest

from m3runtime.testing.cachestat import can_tell, unsynced_files, unsynced_pages


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if not can_tell(tmp_path):
        pytest.skip("this kernel or file system does not tell")
    return tmp_path


def test_sees_what_was_not_synced(folder: Path) -> None:
    with (folder / "data").open("wb") as file:
        file.write(bytes(100_000))
        file.flush()
        pages = -(-100_000 // os.sysconf("SC_PAGESIZE"))
        assert (unsynced_pages(folder / "data") or 0) >= pages
        assert list(unsynced_files(folder)) == ["data"]
        os.fsync(file.fileno())
    assert unsynced_pages(folder / "data") == 0
    assert unsynced_files(folder) == {}


def test_one_byte_is_enough(folder: Path) -> None:
    (folder / "below").mkdir()
    path = folder / "below" / "data"
    with path.open("wb") as file:
        file.write(bytes(100_000))
        file.flush()
        os.fsync(file.fileno())
        file.seek(50_000)
        file.write(b"1")
        file.flush()
        assert list(unsynced_files(folder)) == ["below/data"]  # and as many pages as the kernel keeps together


def test_locks_are_left_out(folder: Path) -> None:
    (folder / "lock.mdb").write_bytes(bytes(100))
    (folder / "writer.lock").write_bytes(bytes(100))
    assert unsynced_files(folder) == {}
