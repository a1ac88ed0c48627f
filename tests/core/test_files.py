"""A file is written whole or not at all, whatever lies in its place and wherever a folder cannot be opened."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from m3runtime.codecs import files
from m3runtime.codecs.raw import RawCodec
from m3runtime.errors import CodecError
from m3runtime.memory.spec import MemorySpec
from m3runtime.storage.files import write_atomically

SPEC = MemorySpec(layers=(0,), kv_heads=1, tokens=2, head_dim=4, reference_tokens=2, dtype="float32")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to open a folder, as Windows does, whose `os` has no ``O_DIRECTORY`` either."""
    opened = os.open

    def refusing(path: Any, *arguments: Any, **named: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.delattr(os, "O_DIRECTORY")


@pytest.mark.usefixtures("windows")
def test_a_codec_is_saved_where_no_folder_can_be_opened(tmp_path: Path) -> None:
    RawCodec(SPEC).save(tmp_path / "codec")
    assert RawCodec.load(tmp_path / "codec", SPEC).fingerprint == RawCodec(SPEC).fingerprint
    assert [file.name for file in tmp_path.iterdir()] == ["codec"]


def test_bytes_and_what_a_function_writes_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"one")
    assert path.read_bytes() == b"one"
    write_atomically(path, lambda temporary: temporary.write_text("two") and None, mode=0o600)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("at", ["content", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    if at != "content":
        monkeypatch.setattr(*((os, "fsync") if at == "fsync" else (Path, "replace")), fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail if at == "content" else b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"precious")
    (tmp_path / "file").symlink_to(tmp_path / "other")
    write_atomically(tmp_path / "file", b"new")
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "other").read_bytes() == b"precious"


@pytest.mark.parametrize("place", ["folder", "missing/file"])
def test_a_place_that_takes_no_file_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=place.split("/")[0]):
        write_atomically(tmp_path / place, b"new")
    with pytest.raises(CodecError, match="cannot be written"):
        files.replace(tmp_path / place, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
