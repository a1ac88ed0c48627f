"""Traces: written, read, torn, and replayed on another tier."""

import os
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3backends.slabs import PinnedTier
from m3runtime.errors import InputError, TierClosedError
from m3runtime.lab.bench.trace import Trace, read_trace
from m3runtime.storage.tier import CachingTier, Tier
from m3runtime.storage.trace import Op, TracedTier, TraceWriter
from m3runtime.testing.blocks import LAST_ID, SLOT_BYTES, make_blocks, make_ids
from m3runtime.testing.recording import RecordingTier, replay
from m3runtime.testing.slab import SlabTierContract
from m3runtime.testing.tier import together
from tests.forked import Program


def pinned(slots: int, eviction: str = "lru") -> PinnedTier:
    return PinnedTier(slot_bytes=SLOT_BYTES, capacity=slots * SLOT_BYTES, eviction=eviction)


def write(path: Path, *ops: Op, slots: int = 3) -> Path:
    """A trace as a recording process leaves it."""
    writer = TraceWriter(path, SLOT_BYTES, [pinned(slots)])
    for op in ops:
        writer.write(op)
    writer.close()
    return path


OPS = (
    Op("read", (0, LAST_ID)),
    Op("score", (0, LAST_ID), scores=(0.1, -1.0)),
    Op("write", ()),
    Op("contains", (3, 4), found=(True, False)),
    Op("lift", (5,), error="TierError"),
)
TIERS = (TracedTier("pinned", 3 * SLOT_BYTES),)


def test_reads_what_was_written(tmp_path: Path) -> None:
    assert read_trace(write(tmp_path / "trace", *OPS)) == Trace(SLOT_BYTES, TIERS, (OPS,))


def test_records_what_a_hierarchy_is_asked_for(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "trace", SLOT_BYTES, [pinned(3)])
    scores = np.array([0.1, 1 / 3], np.float32)
    writer.record("read", make_ids(7, LAST_ID))
    writer.record("score", make_ids(7, 8), scores)
    # It is all in the file already.
    (run,) = read_trace(tmp_path / "trace").runs
    assert run == (Op("read", (7, LAST_ID)), Op("score", (7, 8), tuple(scores.tolist())))
    assert np.array_equal(np.array(run[1].scores, np.float32), scores)
    writer.close()


def test_another_process_adds_a_run(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    for _ in range(2):
        write(path, *OPS)
    write(path)  # asked for nothing: no run
    assert read_trace(path).runs == (OPS, OPS)


def test_pins_of_an_earlier_release_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "trace", *OPS)
    path.write_bytes(path.read_bytes() + b'{"op": "pin", "ids": [7]}\n' + READ + b'{"op": "unpin", "ids": [7, 8]}\n')
    assert read_trace(path).runs == ((*OPS, Op("read", (1,))),)


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_torn_last_line_is_passed_over_and_cut_off_by_the_next_run(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "trace", *OPS)
    path.write_bytes(path.read_bytes()[:-cut])
    lost = read_trace(path).runs[0]
    assert lost == OPS[: len(lost)]
    assert len(OPS) - len(lost) <= 2
    write(path, *OPS)
    first, second = read_trace(path).runs
    assert (first, second) in ((lost, OPS), (OPS[: len(first)], OPS))
    assert len(first) <= len(lost)


def test_a_torn_header_is_begun_anew(tmp_path: Path) -> None:
    whole = write(tmp_path / "trace", *OPS).read_bytes()
    for size in (0, 1, 20, whole.index(b"}]}")):
        (tmp_path / "torn").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"empty|no trace"):
            read_trace(tmp_path / "torn")
        assert read_trace(write(tmp_path / "torn", *OPS)).runs == (OPS,)


HEADER = b'{"m3_trace": 1, "slot_bytes": 256, "tiers": [{"name": "pinned", "capacity": 768}]}\n'
READ = b'{"op": "read", "ids": [1]}\n'
BAD_LINES = {
    b"nonsense\n": "Invalid JSON",
    b"\n": "Invalid JSON",
    b"\xff\xff\n": "Invalid JSON",
    b"[" * 100_000 + b"\n": "Invalid JSON",
    b"[]\n": "must be an object",
    b'{"op": "read"}\n': "ids is missing",
    b'{"op": "fetch", "ids": [1]}\n': "op must be 'read', 'lift'",
    b'{"op": "read", "ids": [-1]}\n': "ids 0 must be greater",
    b'{"op": "read", "ids": [1, 18446744073709551616]}\n': "ids 1 must be less",
    b'{"op": "read", "ids": [1.5]}\n': "ids 0 must be a valid integer",
    b'{"op": "read", "ids": [true]}\n': "ids 0 must be a valid integer",
    b'{"op": "read", "ids": ' + b"9" * 5000 + b"}\n": "number out of range",
    b'{"op": "read", "ids": [1], "when": 3}\n': "when",
    b'{"op": "score", "ids": [1]}\n': "scores belong",
    b'{"op": "read", "ids": [1], "scores": [0.5]}\n': "scores belong",
    b'{"op": "score", "ids": [1], "scores": [0.5, 0.5]}\n': "one value for each id",
    b'{"op": "score", "ids": [1], "scores": [NaN]}\n': "finite",
    b'{"op": "discard", "ids": [1], "found": []}\n': "one value for each id",
}


@pytest.mark.parametrize(("line", "what"), BAD_LINES.items())
def test_any_other_bad_line_is_named(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(HEADER + READ + line + READ)
    with pytest.raises(InputError, match=rf"trace.jsonl: line 3 .*{what}") as caught:
        read_trace(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300 + len(str(path))
    path.write_bytes(HEADER + READ + line)  # at the end it was not torn either: it is whole
    with pytest.raises(InputError, match=r"line 3"):
        read_trace(path)


BAD_HEADERS = {
    b"": "empty",
    READ: "is no trace: line 1",
    b"bank: ./bank\n": "is no trace: line 1",
    HEADER.replace(b"1,", b"2,"): "format 2, this release reads 1",
    HEADER.replace(b"256", b"0"): "slot_bytes must be greater",
    HEADER.replace(b"768", b"-1"): "tiers 0 capacity must be greater",
    HEADER.replace(b'"name"', b'"nom"'): "tiers 0",
}


@pytest.mark.parametrize(("header", "what"), BAD_HEADERS.items())
def test_a_file_that_is_no_trace(tmp_path: Path, header: bytes, what: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(header and header + READ)
    with pytest.raises(InputError, match=rf"trace.jsonl.*{what}"):
        read_trace(path)


def test_files_that_cannot_be_read_or_recorded_into(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match=f"cannot read the trace {path}"):
            read_trace(path)
    for path in (tmp_path / "none" / "trace", tmp_path):
        with pytest.raises(InputError, match=f"cannot record into {path}"):
            write(path)


@pytest.mark.parametrize("content", [b"bank: ./bank\n", b"bank", HEADER.replace(b"256", b"512"), b"x" * 1000])
def test_what_is_not_a_trace_of_these_tiers_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(InputError, match="something else"):
        write(path, *OPS)
    assert path.read_bytes() == content


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no drive that is always full")
def test_a_full_drive_ends_the_recording_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = TraceWriter(tmp_path / "trace", SLOT_BYTES, [pinned(3)])
    writer.write(OPS[0])
    with open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123
        os.dup2(full.fileno(), writer._file.fileno())
    for _ in range(3):
        writer.write(OPS[1])
    (record,) = caplog.records
    assert "ended" in record.getMessage()
    writer.close()
    assert read_trace(tmp_path / "trace").runs == (OPS[:1],)


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "trace", SLOT_BYTES, [pinned(3)])
    together(6, lambda number: [writer.write(Op("read", (number, turn))) for turn in range(50)] and None)
    writer.close()
    writer.close()
    writer.write(OPS[0])  # too late
    (run,) = read_trace(tmp_path / "trace").runs
    for number in range(6):
        assert [op.ids[1] for op in run if op.ids[0] == number] == list(range(50))
    assert len(run) == 300


def test_a_killed_process_leaves_all_that_it_did(tmp_path: Path) -> None:
    program = """
import sys, itertools
from pathlib import Path
from m3runtime.storage.trace import TraceWriter, Op
writer = TraceWriter(Path(sys.argv[1]), 256, [])
for number in itertools.count():
    writer.write(Op("read", (number,)))
    if number == 100:
        print("go", flush=True)
"""
    with Program(program, tmp_path / "trace") as process:
        assert process.stdout.readline() == "go\n"
    (run,) = read_trace(tmp_path / "trace").runs
    assert [op.ids for op in run] == [(number,) for number in range(len(run))]
    assert len(run) > 100


# Recording one tier


class TestRecordingTier(SlabTierContract):
    """A tier that is recorded is a tier."""

    def raw_read(self, tier: Tier, id: int) -> bytes | None:
        assert isinstance(tier, RecordingTier)
        return super().raw_read(tier.inner, id)

    def raw_write(self, tier: Tier, id: int, block: bytes) -> None:
        assert isinstance(tier, RecordingTier)
        super().raw_write(tier.inner, id, block)

    def make(self, *, slot_bytes: int, capacity: int) -> CachingTier:
        return RecordingTier(PinnedTier(slot_bytes=slot_bytes, capacity=capacity), list[Op]().append)


def calls(tier: CachingTier, seed: int, count: int = 150) -> None:
    """A random life."""
    drawing = random.Random(seed)
    for _ in range(count):
        ids = make_ids(*drawing.choices([*range(9), LAST_ID], k=drawing.randrange(5)))
        match drawing.randrange(5):
            case 0 | 1:
                tier.write(ids, make_blocks(ids))
            case 2 | 3:
                tier.read(ids, torch.empty((len(ids), SLOT_BYTES), dtype=torch.uint8))
            case _:
                tier.contains(ids)
                tier.discard(ids[:1])
        tier.score(ids, np.array([drawing.uniform(-1, 1) for _ in ids], np.float32))


@pytest.mark.parametrize("eviction", ["lru", "s3-fifo", "score"])
@pytest.mark.parametrize("seed", range(3))
def test_a_replay_on_an_equal_tier_is_equal(eviction: str, seed: int) -> None:
    ops: list[Op] = []
    calls(RecordingTier(pinned(4, eviction), ops.append), seed)
    assert {op.op for op in ops} == {"read", "write", "discard", "contains", "score"}
    assert replay(ops, pinned(4, eviction)) == ops
    assert replay(ops, pinned(5, eviction)) != ops


def test_a_replay_on_another_policy_need_not_be_equal() -> None:
    ops: list[Op] = []
    calls(RecordingTier(pinned(4), ops.append), 0)
    other = replay(ops, pinned(4, "score"))
    assert [(op.op, op.ids) for op in other] == [(op.op, op.ids) for op in ops]
    assert other != ops


def test_a_recording_in_a_file_replays_too(tmp_path: Path) -> None:
    tier = pinned(4)
    writer, ops = TraceWriter(tmp_path / "trace", SLOT_BYTES, [tier]), list[Op]()

    def record(op: Op) -> None:
        writer.write(op)
        ops.append(op)

    calls(RecordingTier(tier, record), 1)
    writer.close()
    trace = read_trace(tmp_path / "trace")
    assert trace.runs == (tuple(ops),)
    assert replay(trace.runs[0], pinned(4)) == ops


def test_what_a_call_raised_is_recorded_and_replayed() -> None:
    ops: list[Op] = []
    tier = RecordingTier(pinned(4), ops.append)
    tier.close()
    for use in (lambda: tier.contains(make_ids(1)), lambda: tier.score(make_ids(1), np.ones(1, np.float32))):
        with pytest.raises(TierClosedError):
            use()
    assert ops == [Op("contains", (1,), error="TierClosedError"), Op("score", (1,), (1.0,), error="TierClosedError")]
    closed = pinned(4)
    closed.close()
    assert replay(ops, closed) == ops
    assert replay(ops, pinned(4)) == [Op("contains", (1,), found=(False,)), Op("score", (1,), (1.0,))]


def test_the_order_of_a_recording_is_that_of_the_effects() -> None:
    """Threads evict each other's blocks; a replay in the recorded order finds the same."""
    ops: list[Op] = []
    tier = RecordingTier(pinned(3), ops.append)
    together(4, lambda number: calls(tier, number, 40))
    assert replay(ops, pinned(3)) == ops


def test_a_hierarchy_s_trace_is_refused_by_a_tier() -> None:
    with pytest.raises(InputError, match="hierarchy"):
        replay([Op("lift", (1,))], pinned(1))


some_ids = st.lists(st.integers(0, 2**64 - 1), max_size=4).map(tuple)
scored = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.floats(-1, 1, width=32)), max_size=4).map(
    lambda pairs: Op("score", tuple(id for id, _ in pairs), tuple(score for _, score in pairs))
)
some_ops = st.lists(st.builds(Op, st.sampled_from(["read", "lift", "discard"]), some_ids) | scored)


@given(st.lists(some_ops, max_size=3))
def test_a_trace_says_all(runs: list[list[Op]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace")
        for run in [*runs, OPS]:
            write(path, *run)
        assert read_trace(path).runs == (*(tuple(run) for run in runs if run), OPS)
