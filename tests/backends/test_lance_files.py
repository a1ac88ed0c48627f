"""The files of a Lance home: what is cut, left over or damaged."""

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lance")

import lance

from m3backends.lance.home import LanceHome
from m3backends.lance.schema import FILE_FORMAT, as_table, reference_row, table_schema
from m3runtime.errors import BankError, BankMismatchError, BankMissingError, RecordError, TierError
from m3runtime.testing.blocks import DIM, SLOT_BYTES, make_batch, make_blocks, make_embeddings, make_ids, make_reference
from m3runtime.testing.home import check_whole, contents


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed home with the references 1, 2 and 3."""
    with LanceHome(path=tmp_path / "home", slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch([1, 2]))
        home.commit(make_batch([3]))
    return tmp_path / "home"


def newest(path: Path) -> Path:
    return min((path / "_versions").glob("*.manifest"))


@pytest.mark.parametrize("left", [0, 1, 100, -1])
@pytest.mark.parametrize("hint", [True, False])
def test_a_manifest_that_a_power_cut_left_short_is_set_aside(path: Path, left: int, hint: bool) -> None:
    with LanceHome(path=path) as home:
        before = contents(home)
        home.commit(make_batch([4]))
    os.truncate(newest(path), left if left >= 0 else newest(path).stat().st_size + left)
    if not hint:
        (path / "_versions" / "latest_version_hint.json").unlink()
    with pytest.raises(BankError, match="opening it for writing"):
        LanceHome(path=path, read_only=True)
    with LanceHome(path=path) as home:
        assert contents(home) == before
        home.commit(make_batch([4]))
        check_whole(home, make_ids(1, 2, 3, 4))
    with LanceHome(path=path, read_only=True) as home:
        check_whole(home, make_ids(1, 2, 3, 4))


def test_several_short_manifests_are_set_aside(path: Path) -> None:
    with LanceHome(path=path) as home:
        before = contents(home)
        home.commit(make_batch([4]))
        home.commit(make_batch([5]))
    for manifest in sorted((path / "_versions").glob("*.manifest"))[:2]:
        manifest.write_bytes(bytes(manifest.stat().st_size))
    with LanceHome(path=path) as home:
        assert contents(home) == before


def test_without_a_whole_manifest_the_home_says_so(path: Path) -> None:
    for manifest in (path / "_versions").glob("*.manifest"):
        manifest.write_bytes(b"")
    with pytest.raises(BankError, match="no manifest of its table is whole; restore it") as raised:
        LanceHome(path=path)
    assert "\n" not in str(raised.value)
    assert not list((path / "_versions").glob("*.cut"))


def test_compaction_removes_what_a_killed_process_left(path: Path) -> None:
    stray = as_table([reference_row(9, make_reference(9), np.zeros(DIM, np.float32), 0)], DIM)
    lance.fragment.write_fragments(
        stray, str(path), mode="append", schema=table_schema(DIM), data_storage_version=FILE_FORMAT
    )
    (path / "_versions" / ".tmp123").write_bytes(make_reference(9).text.encode())
    text = make_reference(9).text[:20].encode()
    assert any(text in file.read_bytes() for file in path.rglob("*") if file.is_file())
    with LanceHome(path=path) as home:
        home.compact()
        check_whole(home, make_ids(1, 2, 3))
    assert not any(text in file.read_bytes() for file in path.rglob("*") if file.is_file())


def test_a_row_that_does_not_fit_its_seal_is_damaged(path: Path) -> None:
    row = reference_row(9, make_reference(9), make_embeddings(make_ids(9))[0], 7)
    lance.write_dataset(
        as_table([{**row, "value": row["value"] + b" "}], DIM),
        str(path),
        mode="append",
        schema=table_schema(DIM),
        data_storage_version=FILE_FORMAT,
    )
    with LanceHome(path=path) as home:
        with pytest.raises(RecordError, match="the reference of 9 is damaged") as raised:
            home.references(make_ids(1, 9))
        assert raised.value.id == 9
        with pytest.raises(RecordError, match="the embedding of 9 is damaged") as raised:
            list(home.embeddings())
        assert raised.value.id == 9
        found = {(damage.where, damage.id) for damage in home.audit()}
        assert {("reference", 9), ("embedding", 9), ("home", None)} <= found  # the last: 9 is beyond the next id
        home.discard(make_ids(9))
        assert home.ids().tolist() == [1, 2, 3]


def test_a_text_that_stands_twice_is_found(path: Path) -> None:
    row = reference_row(2, make_reference(2), make_embeddings(make_ids(2))[0], 7)
    lance.write_dataset(
        as_table([row], DIM), str(path), mode="append", schema=table_schema(DIM), data_storage_version=FILE_FORMAT
    )
    with LanceHome(path=path) as home:
        assert {"it stands 2 times in the table"} <= {damage.what for damage in home.audit() if damage.id == 2}


def test_a_damaged_data_file_is_a_fault_of_one_line(path: Path) -> None:
    for file in (path / "data").glob("*.lance"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises((TierError, BankError)) as raised, LanceHome(path=path) as home:
        home.references(make_ids(1))
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_what_is_no_home_is_refused(tmp_path: Path, path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(BankError, match="not the folder of a bank"):
        LanceHome(path=tmp_path / "file", slot_bytes=SLOT_BYTES)
    with pytest.raises(BankMissingError):
        LanceHome(path=tmp_path / "none")
    with pytest.raises(BankMismatchError, match=f"slots of {SLOT_BYTES} bytes, not 512"):
        LanceHome(path=path, slot_bytes=512)


def test_a_home_refuses_to_be_used_in_a_process_that_forked(path: Path) -> None:
    home = LanceHome(path=path)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        said = "nothing"
        try:
            with pytest.raises(TierError, match="opened before this process forked; open it anew in this one"):
                home.ids()
            said = "refused"
        except BaseException as error:  # noqa: BLE001 - told to the parent
            said = repr(error)
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "refused"
    assert home.fill(make_ids(1), make_blocks(make_ids(1))).tolist() == [False]
    home.close()
