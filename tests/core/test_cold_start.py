"""Cold references: encoded at their first recall, once, and stored."""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3runtime.bank.index import catch_up
from m3runtime.errors import BankMismatchError, CodecError, ConfigError, M3Error, StoreFullError, TierError
from m3runtime.memory.block import as_ids
from m3runtime.observe.metrics import RECALL_PHASES
from m3runtime.recall.recalled import Recalled
from m3runtime.runtime import Runtime
from m3runtime.storage.home import Home
from m3runtime.storage.tier import CachingTier
from m3runtime.testing.faulty import Fault, FaultyHome, Schedule
from m3runtime.testing.threads import together
from tests.core.recalling import PART_BYTES, TEXTS, WORDS, TextAdapter, no_tiers, open_runtime, pinned, shut

ALL = range(len(TEXTS))
QUERIES = st.lists(st.sampled_from(TEXTS) | st.sampled_from(WORDS), min_size=1, max_size=5)
FEW = settings(max_examples=20)


def adapter_of(runtime: Runtime) -> TextAdapter:
    assert isinstance(runtime.encoder, TextAdapter)
    return runtime.encoder


def read_by(runtime: Runtime) -> list[str]:
    """The texts that the model read, in order."""
    return [text for call in adapter_of(runtime).calls for text in call]


def cold_of(runtime: Runtime) -> list[int]:
    return runtime.bank.home.cold().tolist()


def open_cold(path: Path, **options: Any) -> Runtime:
    """A runtime with a cold start, over a bank in whose catalogue everything is, and nothing else."""
    given: dict[str, Any] = {"cold": ALL, "encoder": TextAdapter(), "cold_start": True}
    return open_runtime(path, **{**given, **options})


def faulty(schedule: Schedule) -> Callable[[Home], Home]:
    return lambda home: FaultyHome(home, schedule)


def same(one: Recalled, other: Recalled) -> bool:
    """Whether they are the same memories to the last bit, in the same order."""
    return (one.ids, one.scores, one.references, one.log_weights, one.late) == (
        other.ids,
        other.scores,
        other.references,
        other.log_weights,
        other.late,
    ) and all(
        torch.equal(mine, theirs)
        for part, like in zip(one.parts, other.parts, strict=True)
        for mine, theirs in zip(part, like, strict=True)
    )


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with open_cold(tmp_path / "bank") as runtime:
        yield runtime


# -- laws -------------------------------------------------------------------------------------------------------------


@FEW
@given(
    cold=st.sets(st.sampled_from(list(ALL))),
    chunks=st.lists(QUERIES, min_size=1, max_size=4),
    tiers=st.sampled_from([no_tiers, pinned(2), pinned(40)]),
    when_late=st.sampled_from(["wait", "skip", "next_chunk"]),
)
def test_a_cold_bank_gives_what_a_warm_one_gives(
    cold: set[int], chunks: list[list[str]], tiers: Callable[[int], list[CachingTier]], when_late: str
) -> None:
    """Whatever is cold, wherever streams recall it, whether or not others hold it already."""
    with tempfile.TemporaryDirectory() as folder:
        with open_runtime(Path(folder) / "warm") as warm:
            streams = [warm.stream() for _ in range(5)]
            expected = [warm.recall(streams[: len(texts)], texts) for texts in chunks]
        with open_cold(Path(folder) / "cold", cold=cold, tiers=tiers, when_late=when_late) as runtime:
            streams = [runtime.stream() for _ in range(5)]
            for texts, wanted in zip(chunks, expected, strict=True):
                recalled = runtime.recall(streams[: len(texts)], texts, wait=True)
                assert all(same(one, other) for one, other in zip(recalled, wanted, strict=True))
            chosen = {id for some in expected for one in some for id in one.ids}
            assert set(cold_of(runtime)) == cold - chosen
            assert sorted(read_by(runtime)) == sorted(TEXTS[id] for id in cold & chosen)
            assert runtime.metrics().recall.encoded == len(cold & chosen)
        with open_runtime(Path(folder) / "cold") as again:
            assert set(again.fetch(ALL, torch.float32)) == set(ALL) - (cold - chosen)


@FEW
@given(cold=st.sets(st.sampled_from(list(ALL))), text=st.sampled_from(TEXTS))
def test_without_a_cold_start_the_next_best_are_recalled(cold: set[int], text: str) -> None:
    with tempfile.TemporaryDirectory() as folder, open_runtime(Path(folder) / "bank", cold=cold) as runtime:
        with open_runtime(Path(folder) / "warm", memories=len(TEXTS)) as warm:
            (ranked,) = warm.search([text])
        with runtime.stream() as stream:
            recalled = stream.recall(text)
        assert list(recalled.ids) == [match.id for match in ranked if match.id not in cold][:3]
        assert set(cold_of(runtime)) == cold


# -- once -------------------------------------------------------------------------------------------------------------


def test_threads_that_recall_the_same_wait_for_one_encoding(tmp_path: Path) -> None:
    with open_cold(tmp_path / "bank", sections={"metrics": {"timeline": 100}}) as runtime:
        adapter, streams = adapter_of(runtime), [runtime.stream() for _ in range(6)]
        with ThreadPoolExecutor(len(streams)) as threads, shut(adapter.gate):
            recalls = [threads.submit(stream.recall, TEXTS[0]) for stream in streams]
            adapter.entered.acquire()
            while len({one for event in runtime.timeline() if event.name == "embed" for one in event.streams}) < 6:
                time.sleep(0.001)
            adapter.gate.set()
            recalled = [one.result() for one in recalls]
        assert sorted(read_by(runtime)) == sorted(TEXTS[id] for id in recalled[0].ids)
        assert len(recalled[0]) == 3
        assert all(same(one, recalled[0]) for one in recalled)
        assert runtime.metrics().recall.encoded == 3


def test_threads_that_recall_anything_encode_each_reference_once(tmp_path: Path) -> None:
    with open_cold(tmp_path / "bank", tiers=pinned(4)) as runtime:

        def work(number: int) -> None:
            with runtime.stream() as stream:
                for turn in range(8):
                    stream.hint(TEXTS[(5 * number + turn + 1) % len(TEXTS)])
                    assert len(stream.recall(TEXTS[(5 * number + turn) % len(TEXTS)])) == 3

        together(4, work)
        assert runtime.background.drain(timeout=60)
        read = read_by(runtime)
        assert len(read) == len(set(read)) == runtime.metrics().recall.encoded == len(TEXTS) - len(cold_of(runtime))
        assert runtime.metrics().lookahead.failed == 0


def test_what_streams_recall_together_is_read_by_the_model_at_once(runtime: Runtime) -> None:
    streams = [runtime.stream() for _ in range(3)]
    recalled = runtime.recall(streams, TEXTS[:3])
    (call,) = adapter_of(runtime).calls
    assert sorted(call) == sorted({TEXTS[id] for one in recalled for id in one.ids})
    runtime.recall(streams, TEXTS[:3])
    assert len(adapter_of(runtime).calls) == 1


def test_the_model_reads_no_more_at_once_than_it_may(tmp_path: Path) -> None:
    with open_cold(tmp_path / "bank", memories=7, sections={"memory": {"batch_size": 3}}) as runtime:
        assert len(runtime.stream().recall(TEXTS[0])) == 7
        assert [len(call) for call in adapter_of(runtime).calls] == [3, 3, 1]


# -- hints and deadlines ----------------------------------------------------------------------------------------------


def test_hints_bring_what_is_encoded_and_ask_no_model(tmp_path: Path) -> None:
    with open_cold(tmp_path / "bank", cold=[0]) as runtime, runtime.stream() as stream:
        stream.hint(TEXTS[0])
        assert runtime.background.drain(timeout=60)
        assert read_by(runtime) == []
        assert runtime.metrics().lookahead.guesses == 2
        recalled = stream.recall(TEXTS[0])
        assert len(recalled) == 3
        assert recalled.ids[0] == 0
        assert read_by(runtime) == [TEXTS[0]]
        assert runtime.metrics().lookahead.hits == 2
        stream.hint(TEXTS[0])
        assert runtime.background.drain(timeout=60)
        assert runtime.metrics().store.guessed == 0


@pytest.mark.parametrize("tiers", [no_tiers, pinned(6)])
@pytest.mark.parametrize("when_late", ["skip", "next_chunk"])
def test_what_was_just_encoded_is_never_late(
    tmp_path: Path, tiers: Callable[[int], list[CachingTier]], when_late: str
) -> None:
    with open_cold(tmp_path / "bank", tiers=tiers, when_late=when_late, deadline="0s") as runtime:
        recalled = runtime.stream().recall(TEXTS[0])
        assert len(recalled) == 3
        assert recalled.late == ()


def test_what_was_just_encoded_is_late_where_the_store_has_no_room(tmp_path: Path) -> None:
    with (
        open_cold(tmp_path / "bank", memories=1, decoded=PART_BYTES, when_late="skip") as runtime,
        runtime.stream() as one,
        runtime.stream() as other,
    ):
        assert one.recall(TEXTS[5]).ids == (5,)  # of six tokens, the most
        assert other.recall(TEXTS[11]).late == (11,)
        with pytest.raises(StoreFullError):
            other.recall(TEXTS[11], wait=True)


# -- what encodes -----------------------------------------------------------------------------------------------------


def test_a_cold_start_needs_something_that_encodes(tmp_path: Path) -> None:
    with open_cold(tmp_path / "bank", encoder=None) as runtime, runtime.stream() as stream:
        for text in (TEXTS[0], " "):
            with pytest.raises(ConfigError, match=r"recall.cold_start: true needs a model that encodes") as caught:
                stream.recall(text)
            assert "\n" not in str(caught.value)
        assert runtime.search([TEXTS[0]])[0][0].id == 0
        runtime.encoder = TextAdapter()
        assert stream.recall(TEXTS[0]).ids[0] == 0


def test_another_model_is_refused(tmp_path: Path) -> None:
    class Another(TextAdapter):
        model_fingerprint = "9" * 32

    with open_cold(tmp_path / "bank") as runtime:
        mine = runtime.encoder
        with pytest.raises(BankMismatchError, match="written by another model"):
            runtime.encoder = Another()
        assert runtime.encoder is mine


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_what_the_model_refuses_is_set_apart_and_the_others_are_given(tmp_path: Path) -> None:
    with open_cold(tmp_path / "bank") as runtime, runtime.stream() as stream:
        best = [match.id for match in runtime.search([TEXTS[0]])[0]]
        adapter_of(runtime).refused = {TEXTS[best[1]]}
        assert stream.recall(TEXTS[0]).ids == (best[0], best[2])
        assert runtime.bank.home.quarantined() == {best[1]: "it cannot be encoded: this text cannot be read"}
        assert runtime.metrics().recall.encoded == 2
        calls = len(adapter_of(runtime).calls)
        assert runtime.stream().recall(TEXTS[0]).ids == (best[0], best[2])
        assert len(adapter_of(runtime).calls) == calls


@pytest.mark.parametrize("error", [TierError("the device is gone"), ZeroDivisionError("a mistake")])
def test_a_model_that_fails_fails_the_recall_and_changes_nothing(runtime: Runtime, error: Exception) -> None:
    with runtime.stream() as stream:
        held = stream.recall(TEXTS[20]).ids
        adapter_of(runtime).failing = error
        before = cold_of(runtime)
        with pytest.raises(type(error), match=str(error)):
            stream.recall(TEXTS[0])
        assert runtime.metrics().store.leased <= len(held)
        assert cold_of(runtime) == before
        adapter_of(runtime).failing = None
        assert len(stream.recall(TEXTS[0])) == 3


def test_memories_that_the_codec_refuses_are_set_apart(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise CodecError("values too large")

    with monkeypatch.context() as patched:
        patched.setattr(runtime.bank.codec, "encode", refuse)
        assert runtime.stream().recall(TEXTS[0]).ids == ()
    assert len(runtime.bank.home.quarantined()) == 3


def test_without_room_they_are_given_and_stored_when_there_is_some(tmp_path: Path) -> None:
    schedule = Schedule(Fault("no_space", rate=1.0, methods={"fill"}))
    with open_cold(tmp_path / "bank", wrap=faulty(schedule)) as runtime:
        with open_runtime(tmp_path / "warm") as warm:
            expected = warm.stream().recall(TEXTS[0])
        with runtime.stream() as stream, runtime.stream() as other:
            assert same(stream.recall(TEXTS[0]), expected)
            assert same(stream.recall(TEXTS[0]), expected)  # held
            assert same(other.recall(TEXTS[0]), expected)
            counts = runtime.metrics().recall
            assert (counts.encoded, counts.unstored, counts.kept, counts.memories) == (3, 3, 6, 9)
            assert cold_of(runtime) == list(ALL)
            schedule.on = False
            with runtime.stream() as third:
                assert same(third.recall(TEXTS[0]), expected)
        assert len(read_by(runtime)) == 3
        assert set(cold_of(runtime)) == set(ALL) - set(expected.ids)
        assert set(runtime.fetch(expected.ids, torch.float32)) == set(expected.ids)


def test_a_home_that_fails_fails_the_recall(tmp_path: Path) -> None:
    schedule = Schedule(Fault("error", at={1}, methods={"fill"}))
    with open_cold(tmp_path / "bank", wrap=faulty(schedule)) as runtime, runtime.stream() as stream:
        with pytest.raises(TierError, match="fill failed"):
            stream.recall(TEXTS[0])
        assert runtime.metrics().store.leased == 0
        assert len(stream.recall(TEXTS[0])) == 3


def test_a_block_that_rots_while_it_is_stored_is_set_apart(tmp_path: Path) -> None:
    """It is read back and checked like any other: nothing attends to what the drive made of it."""
    schedule = Schedule(Fault("torn_write", at={1}, methods={"fill"}))
    with open_cold(tmp_path / "bank", wrap=faulty(schedule), memories=1) as runtime:
        assert runtime.stream().recall(TEXTS[0]).ids == ()
        assert list(runtime.bank.home.quarantined()) == [0]


def test_what_is_forgotten_is_not_encoded(runtime: Runtime) -> None:
    assert runtime.forget([0, 1]) == 2
    recalled = runtime.stream().recall(TEXTS[0])
    assert not {0, 1} & set(recalled.ids)
    assert not {TEXTS[0], TEXTS[1]} & set(read_by(runtime))
    assert runtime.references([0]) == [None]


@pytest.mark.parametrize("seed", range(3))
def test_forgetting_and_closing_in_the_midst_of_it(tmp_path: Path, seed: int) -> None:
    """Every call ends in a result or a typed error, and every id has its own block or none."""
    runtime = open_cold(tmp_path / "bank", tiers=pinned(3))
    begun = threading.Semaphore(0)

    def work(number: int) -> None:
        if number == 0:
            for _ in range(4 + seed):
                begun.acquire()
            runtime.forget(list(range(seed, len(TEXTS), 4)))
            runtime.close()
            return
        for turn in range(30):
            begun.release()
            try:
                runtime.stream().recall(TEXTS[(7 * number + turn) % len(TEXTS)])
            except M3Error:
                break

    together(3, work)
    with open_runtime(tmp_path / "bank") as again:
        left = again.bank.home.ids().tolist()
        assert set(left) == set(ALL) - set(range(seed, len(TEXTS), 4))
        cold = again.bank.home.cold().tolist()
        assert set(again.fetch(left, torch.float32)) == set(left) - set(cold)


# -- counts and the index ---------------------------------------------------------------------------------------------


def test_encoding_is_counted_and_timed(runtime: Runtime) -> None:
    recalled = runtime.stream().recall(TEXTS[0])
    assert recalled.phases["encode"] > 0
    assert set(recalled.phases) <= set(RECALL_PHASES)
    assert "encode" not in runtime.stream().recall(TEXTS[0]).phases
    metrics = runtime.metrics()
    assert metrics.recall_phases["encode"].count == 1
    assert 0 < metrics.recall.encode_s <= recalled.phases["encode"]
    assert (metrics.recall.encoded, metrics.recall.unstored) == (3, 0)


def test_an_index_holds_what_is_recalled_and_is_not_saved_for_that(tmp_path: Path) -> None:
    with open_cold(tmp_path / "bank", cold=[1, 2]) as runtime:
        index, bank = runtime.retriever.index, runtime.bank
        assert catch_up(index, bank) == (0, 0)
        assert catch_up(index, bank, cold=False) == (0, 0)
        assert index.ids().tolist() == [id for id in ALL if id not in (1, 2)]
        assert catch_up(index, bank, cold=False) == (0, 0)
        assert catch_up(index, bank) == (2, 0)
        bank.home.discard(as_ids([1, 5]))
        assert catch_up(index, bank, cold=False) == (0, 2)
