"""The index of a bank is loaded only from a file that the home's record vouches for; else it is rebuilt."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from m3backends.lmdb.home import LmdbHome
from m3backends.usearch.index import UsearchIndex
from m3runtime.bank.bank import Bank
from m3runtime.bank.index import BankIndex, catch_up
from m3runtime.bank.manifest import Manifest
from m3runtime.codecs.raw import RawCodec
from m3runtime.errors import IndexFileError, TierReadOnlyError
from m3runtime.memory.block import as_ids
from m3runtime.memory.spec import MemorySpec
from m3runtime.retrieval.index import Index
from m3runtime.testing.index import unit_vectors
from tests.core.recalling import references
from tests.core.test_files import windows  # noqa: F401 - a fixture

DIM = 8
SPEC = MemorySpec(layers=(0,), kv_heads=1, tokens=2, head_dim=4, reference_tokens=2, dtype="float32")
IDS = as_ids(range(6))


def open_bank(path: Path, **options: bool) -> Bank:
    return Bank.open(path, lambda path: LmdbHome(path=path, **options), lambda *_: RawCodec(SPEC))


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[Bank]:
    """A bank with six cold references."""
    codec = RawCodec(SPEC)
    manifest = Manifest(
        model="1" * 32,
        model_name="none",
        tokenizer="2" * 32,
        sink="",
        spec=SPEC,
        codec_kind=codec.kind,
        codec_options=codec.options,
        codec=codec.fingerprint,
        embedder="3" * 32,
        embedder_name="words",
        dim=DIM,
    )
    made = Bank.create(tmp_path / "bank", LmdbHome, manifest, codec)
    made.home.catalogue(IDS, references()[: len(IDS)], unit_vectors(len(IDS), DIM))
    yield made
    made.close()


def upkeep(
    bank: Bank, make: Callable[[], Index] = lambda: UsearchIndex(dim=DIM), kind: str = "usearch", dtype: str = "f16"
) -> BankIndex:
    return BankIndex(bank, make, kind=kind, dtype=dtype)


class Untouchable(UsearchIndex):
    """An index that must be given no file."""

    def load(self, data: memoryview) -> None:
        raise AssertionError("it was given bytes that nobody vouches for")


def is_rebuilt(bank: Bank) -> bool:
    """Is the file given to no library, and the index made of the home's embeddings?"""
    with pytest.raises(IndexFileError):
        upkeep(bank, lambda: Untouchable(dim=DIM)).load()
    index, changed = upkeep(bank).open(cold=True)
    found, scores = index.search(unit_vectors(len(IDS), DIM), 1)
    assert found[:, 0].tolist() == IDS.tolist()
    assert scores == pytest.approx(1, abs=1e-3)
    return changed


def test_the_file_of_the_last_update_is_loaded(bank: Bank) -> None:
    upkeep(bank).update()
    index, changed = upkeep(bank).open(cold=True)
    assert not changed
    assert index.ids().tolist() == IDS.tolist()
    assert sorted(path.name for path in bank.path.iterdir()) == ["codec.safetensors", "home", "index"]


def test_an_update_that_changes_nothing_writes_nothing(bank: Bank) -> None:
    upkeep(bank).update()
    before = upkeep(bank).path.stat()
    upkeep(bank).update()
    after = upkeep(bank).path.stat()  # whose time of access may be another
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


def test_it_follows_the_home(bank: Bank) -> None:
    upkeep(bank).update()
    bank.home.discard(IDS[:2])
    index, changed = upkeep(bank).open(cold=True)
    assert changed
    assert index.ids().tolist() == IDS[2:].tolist()
    assert catch_up(index, bank) == (0, 0)


def test_without_cold_references_the_file_keeps_them(bank: Bank) -> None:
    upkeep(bank).update()
    index, changed = upkeep(bank).open(cold=False)
    assert (len(index), changed) == (0, False)
    assert upkeep(bank).load().ids().tolist() == IDS.tolist()


def test_one_flipped_byte_anywhere(bank: Bank) -> None:
    upkeep(bank).update()
    path, untouchable = upkeep(bank).path, upkeep(bank, lambda: Untouchable(dim=DIM))
    good = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for place, byte in enumerate(good):
            file.seek(place)
            file.write(bytes([byte ^ 1 << (place % 8)]))
            with pytest.raises(IndexFileError, match="digest"):
                untouchable.load()
            file.seek(place)
            file.write(bytes([byte]))
    assert upkeep(bank).load().ids().tolist() == IDS.tolist()


@pytest.mark.parametrize(
    "work",
    [
        lambda good: b"",
        lambda good: good[:1],
        lambda good: good[:-1],
        lambda good: good[1:],
        lambda good: good + b"\0",
        lambda good: bytes(len(good)),
    ],
)
def test_a_file_of_other_bytes_is_rebuilt(bank: Bank, work: Callable[[bytes], bytes]) -> None:
    upkeep(bank).update()
    path = upkeep(bank).path
    path.write_bytes(work(path.read_bytes()))
    assert is_rebuilt(bank)


def test_a_file_without_a_record_as_earlier_releases_wrote_it_is_rebuilt(bank: Bank) -> None:
    index, _ = upkeep(bank).open(cold=True)
    index.save(upkeep(bank).path)
    assert is_rebuilt(bank)
    upkeep(bank).update()
    assert upkeep(bank).load().ids().tolist() == IDS.tolist()


def test_a_crash_between_the_file_and_its_record_leaves_a_file_to_be_rebuilt(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    upkeep(bank).update()
    bank.home.discard(IDS[:1])
    index, _ = upkeep(bank).open(cold=True)

    def crash(key: str, value: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bank.home, "set_meta", crash)
        with pytest.raises(KeyboardInterrupt):
            upkeep(bank).save(index)
    with pytest.raises(IndexFileError):
        upkeep(bank, lambda: Untouchable(dim=DIM)).load()
    rebuilt, changed = upkeep(bank).open(cold=True)
    assert changed
    assert rebuilt.ids().tolist() == IDS[1:].tolist()


@pytest.mark.parametrize("other", [{"kind": "flat"}, {"dtype": "f32"}])
def test_another_kind_or_dtype_is_rebuilt(bank: Bank, other: dict[str, str]) -> None:
    upkeep(bank).update()
    (name, value), *_ = other.items()
    with pytest.raises(IndexFileError, match=f"of {name} .*, not '{value}'"):
        upkeep(bank, lambda: Untouchable(dim=DIM), **other).load()


@pytest.mark.parametrize(
    "record",
    [b"", b"{", b"[]", b"\xff", b"[" * 60_000, b'{"kind":"usearch"}', b'{"kind":1,"dtype":2,"bytes":"3","digest":4}'],
)
def test_a_record_that_is_none_is_damaged(bank: Bank, record: bytes) -> None:
    upkeep(bank).update()
    bank.home.set_meta("index", record)
    with pytest.raises(IndexFileError, match=r"record of .* is damaged"):
        upkeep(bank, lambda: Untouchable(dim=DIM)).load()
    assert is_rebuilt(bank)


def test_a_bank_open_for_reading_loads_the_file_or_rebuilds_and_writes_nothing(bank: Bank) -> None:
    upkeep(bank).update()
    bank.close()
    for missing in (False, True):
        if missing:
            upkeep(bank).path.unlink()
        reading = open_bank(bank.path, read_only=True)
        index, changed = upkeep(reading).open(cold=True)
        assert index.ids().tolist() == IDS.tolist()
        assert changed == missing
        reading.close()
    assert not upkeep(bank).path.exists()


def test_saving_a_bank_open_for_reading_is_refused_and_the_index_is_rebuilt(bank: Bank) -> None:
    bank.close()
    reading = open_bank(bank.path, read_only=True)
    index, _ = upkeep(reading).open(cold=True)
    with pytest.raises(TierReadOnlyError):
        upkeep(reading).save(index)
    assert is_rebuilt(reading)
    reading.close()


def test_a_failed_save_leaves_the_file_before_it(bank: Bank) -> None:
    class Full(UsearchIndex):
        def save(self, path: Path) -> None:
            path.write_bytes(b"half")
            raise IndexFileError("the drive is full")

    upkeep(bank).update()
    with pytest.raises(IndexFileError, match="full"):
        upkeep(bank).save(Full(dim=DIM))
    assert upkeep(bank).load().ids().tolist() == IDS.tolist()
    assert sorted(path.name for path in bank.path.iterdir()) == ["codec.safetensors", "home", "index"]


def test_a_folder_in_its_place_is_neither_read_nor_replaced(bank: Bank) -> None:
    upkeep(bank).path.mkdir()
    assert is_rebuilt(bank)
    with pytest.raises(IndexFileError, match="cannot write index"):
        upkeep(bank).update()


@pytest.mark.usefixtures("windows")
def test_an_index_is_saved_where_no_folder_can_be_opened(bank: Bank) -> None:
    upkeep(bank).update()
    assert upkeep(bank).load().ids().tolist() == IDS.tolist()


def test_an_index_that_saves_no_bytes_is_given_none(bank: Bank) -> None:
    class Forgetful(UsearchIndex):
        def save(self, path: Path) -> None:
            path.write_bytes(b"")

        def load(self, data: memoryview) -> None:
            assert len(data) == 0

    upkeep(bank, lambda: Forgetful(dim=DIM)).update()
    assert len(upkeep(bank, lambda: Forgetful(dim=DIM)).load()) == 0
