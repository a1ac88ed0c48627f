"""``m3 bench eviction``: it replays as the hierarchy does, and its optimum is one."""

import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3backends.lmdb.home import LmdbHome
from m3backends.slabs import PinnedTier
from m3runtime.config.schema import Config
from m3runtime.lab.bench.eviction import OPTIMUM, Run, bench_eviction, optimum, replay, requests
from m3runtime.lab.bench.trace import read_trace
from m3runtime.runtime import Runtime
from m3runtime.storage.eviction import POLICIES, make_policy
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.storage.trace import Op, TraceWriter
from m3runtime.testing.blocks import LAST_ID, SLOT_BYTES, STAMP, make_batch, make_ids
from tests.end_to_end.commands import FACTS, Place

NAMES = sorted(POLICIES)


def ops_of(ids: st.SearchStrategy[int], size: int) -> st.SearchStrategy[Op]:
    some = st.lists(ids, max_size=size).map(tuple)
    plain = st.builds(Op, st.sampled_from(["read", "read", "read", "lift", "discard"]), some)
    scored = st.lists(st.tuples(ids, st.floats(-1, 1, width=32)), max_size=size).map(
        lambda pairs: Op("score", tuple(id for id, _ in pairs), tuple(score for _, score in pairs))
    )
    return plain | scored


def live(hierarchy: Hierarchy, seed: int, calls: int) -> None:
    """Streams that come and go: they read what they do not hold, and look ahead."""
    drawing, held = random.Random(seed), [set[int]() for _ in range(3)]
    popular = [int(drawing.paretovariate(0.7)) % 40 for _ in range(400)]
    for _ in range(calls):
        number = drawing.randrange(3)
        if drawing.random() < 0.3:
            hierarchy.lift(make_ids(*drawing.choices(popular, k=drawing.randrange(45))))
        chosen = dict.fromkeys(drawing.choices(popular, k=3))
        new = make_ids(*(id for id in chosen if id not in held[number]))
        hierarchy.read(new, torch.empty((len(new), SLOT_BYTES), dtype=torch.uint8))
        hierarchy.score(make_ids(*chosen), np.array([drawing.uniform(-1, 1) for _ in chosen], np.float32))
        if drawing.random() < 0.8:  # or it is closed before it holds anything
            held[number] = set(chosen)


@pytest.mark.parametrize("eviction", NAMES)
@pytest.mark.parametrize("slots", [1, 4, 9, 20])
def test_a_replay_counts_what_the_hierarchy_counted(tmp_path: Path, eviction: str, slots: int) -> None:
    tier = PinnedTier(slot_bytes=SLOT_BYTES, capacity=slots * SLOT_BYTES, eviction=eviction)
    with LmdbHome(path=tmp_path / "home", slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch(range(40)))
        recorder = TraceWriter(tmp_path / "trace", SLOT_BYTES, [tier])
        hierarchy = Hierarchy([tier], home, STAMP, record=recorder.record)
        live(hierarchy, seed=slots, calls=250)
        hierarchy.close()
        recorder.close()
    (run,) = read_trace(tmp_path / "trace").runs
    assert {op.op for op in run} == {"read", "lift", "score"}
    below = hierarchy.stats()[1]
    found = bench_eviction(tmp_path / "trace", NAMES, [])
    (row,) = (row for row in found.rows if row.policy == eviction and row.slots == slots)
    assert row.brought_up == below.hits + below.lifted
    assert row.hits + row.brought_up == found.requests == requests([run])
    assert found.blocks <= row.brought_up


def test_forgotten_blocks_leave_the_replay_too(tmp_path: Path) -> None:
    run = [Op("read", (1, 2)), Op("discard", (1, 9)), Op("read", (1, 2)), Op("read", (1,))]
    for name in NAMES:
        assert replay(run, make_policy(name, 2)) == 2
    assert optimum(run, 2) == 2


def by_brute_force(run: Run, slots: int) -> int:
    """The most hits over every way to keep, after each call, some of what was held or brought up."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for op in run:
        following: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            there, now = held, hits
            if op.op in ("read", "lift"):
                there, now = held | frozenset(op.ids), hits + len(held.intersection(op.ids))
            elif op.op == "discard":
                there = held - frozenset(op.ids)
            for size in range(min(slots, len(there)) + 1):
                for kept in map(frozenset, combinations(sorted(there), size)):
                    following[kept] = max(following.get(kept, 0), now)
        best = following
    return max(best.values())


few = st.lists(st.sampled_from([0, 1, 2, 3, LAST_ID]), min_size=1, max_size=2).map(tuple)
few_ops = st.builds(Op, st.sampled_from(["read"] * 6 + ["lift", "discard"]), few)


@given(st.lists(few_ops, min_size=6, max_size=14), st.integers(0, 3))
@settings(max_examples=200)
def test_the_optimum_is_the_best_of_all_ways(run: list[Op], slots: int) -> None:
    assert optimum(run, slots) == by_brute_force(run, slots)


@given(st.lists(ops_of(st.integers(0, 11), 5), max_size=60), st.integers(1, 8))
def test_no_policy_beats_the_optimum(run: list[Op], slots: int) -> None:
    best = optimum(run, slots)
    assert all(replay(run, make_policy(name, slots)) <= best for name in NAMES)
    assert optimum(run, slots + 1) >= best


def test_the_optimum_of_an_example() -> None:
    """Belady's own point: what is needed last makes room. And what is not needed again is not kept at all."""
    run = [Op("read", (id,)) for id in (1, 2, 3, 1, 2, 4, 1, 2, 3)]
    assert optimum(run, 2) == 4
    assert [optimum(run, slots) for slots in (0, 1, 3, 100)] == [0, 2, 5, 5]
    assert replay(run, make_policy("lru", 2)) == 0


# The command


def record(path: Path, *runs: Sequence[Op], slots: int = 4) -> Path:
    for run in runs:
        writer = TraceWriter(path, SLOT_BYTES, [PinnedTier(slot_bytes=SLOT_BYTES, capacity=slots * SLOT_BYTES)])
        for op in run:
            writer.write(op)
        writer.close()
    return path


READS = [Op("read", (id % 7, id % 5 + 10)) for id in range(60)]


def test_machines_get_counts_that_add_up(place: Place) -> None:
    record(place.folder / "trace.jsonl", READS, READS[:20])
    found = place.m3("bench", "eviction", "--trace", "trace.jsonl", "--json").json
    assert (found["runs"], found["requests"], found["blocks"], found["slot_bytes"]) == (2, 160, 24, SLOT_BYTES)
    assert [(row["slots"], row["policy"]) for row in found["rows"]] == [
        (slots, policy) for slots in (1, 4, 16) for policy in (*POLICIES, OPTIMUM)
    ]
    for row in found["rows"]:
        assert row["hits"] + row["brought_up"] == 160
        assert row["hit_rate"] == row["hits"] / 160
        assert row["bytes"] == row["brought_up"] * SLOT_BYTES
        assert row["brought_up"] >= 24
    assert [row["brought_up"] for row in found["rows"] if row["slots"] == 16] == [24] * 4
    again = place.m3("bench", "eviction", "--trace", "trace.jsonl", "--json").json
    assert again == found


def test_capacities_and_policies_can_be_chosen(place: Place) -> None:
    record(place.folder / "trace.jsonl", READS)
    chosen = ("--capacity", "1KiB", "--capacity", "3KiB", "--capacity", "1100B", "--policy", "score")
    found = place.m3("bench", "eviction", "--trace", "trace.jsonl", *chosen, "--json").json
    assert [(row["slots"], row["policy"]) for row in found["rows"]] == [
        (4, "score"), (4, OPTIMUM), (12, "score"), (12, OPTIMUM)
    ]  # fmt: skip


def test_people_get_a_table(place: Place) -> None:
    record(place.folder / "trace.jsonl", READS)
    result = place.m3("bench", "eviction", "--trace", "trace.jsonl")
    assert result.code == 0
    assert result.err == ""
    for word in (*POLICIES, OPTIMUM, "hit rate", "1 KiB", "120 requests of 12 blocks; runs: 1"):
        assert word in result.out


def test_mistakes_end_in_one_line(place: Place) -> None:
    trace = record(place.folder / "trace.jsonl", READS)
    place.text("empty.jsonl", "")
    place.text("bad.jsonl", trace.read_text() + "{}\n")
    record(place.folder / "idle.jsonl", [Op("discard", (1,))])
    record(place.folder / "small.jsonl", READS, slots=0)
    for file, what in {
        "none.jsonl": "cannot read the trace none.jsonl",
        ".": "cannot read the trace .",
        "empty.jsonl": "the trace empty.jsonl is empty",
        "bad.jsonl": "bad.jsonl: line 62 op is missing",
        "m3.yaml": "m3.yaml is no trace",
        "idle.jsonl": "idle.jsonl holds no reads yet",
        "small.jsonl": "give --capacity",
    }.items():
        assert what in place.m3("bench", "eviction", "--trace", file).complaint
    for options, what in {
        ("--capacity", "much"): "--capacity must be a size",
        ("--capacity", "255"): "--capacity 255B is too small: a block takes 256 bytes",
        ("--policy", "fifo"): "one of lru, s3-fifo, score, not 'fifo'",
    }.items():
        assert what in place.m3("bench", "eviction", "--trace", "trace.jsonl", *options).complaint
    missing = place.m3("bench", "eviction")
    assert missing.code == 2
    assert "--trace" in missing.err


def test_what_a_runtime_is_asked_for_is_recorded(written: Place) -> None:
    written.configure(recall={"trace": "./trace.jsonl"})
    config = Config.load(written.file, environ={})
    assert config.recall.trace == written.folder / "trace.jsonl"
    texts = [" ".join(text.split()) for text in FACTS.values()]
    with Runtime.open(config) as runtime:
        slot = runtime.bank.home.slot_bytes
        with runtime.stream() as stream:
            chosen = [stream.recall(text) for text in (texts[0], texts[0], texts[1])]
            stream.hint(texts[2])
            runtime.background.drain()
        runtime.forget([chosen[0].ids[0]])
    trace = read_trace(config.recall.trace)
    (run,) = trace.runs
    assert trace.slot_bytes == slot
    assert [tier.name for tier in trace.tiers] == ["pinned"]
    assert chosen[0].ids == chosen[1].ids != chosen[2].ids
    reads = [op.ids for op in run if op.op == "read"]
    assert reads[0] == chosen[0].ids  # what the stream holds is not read again
    assert set(reads[1]) == set(chosen[2].ids) - set(chosen[1].ids)
    assert len(reads) == 3  # what a hint guesses is read ahead, and then told what retrieval thought of it
    scores = [(op.ids, op.scores) for op in run if op.op == "score"]
    assert scores[:3] == [(one.ids, one.scores) for one in chosen]
    ahead = max(at for at, op in enumerate(run) if op.op == "read")
    assert run[ahead + 1].op == "score"
    assert set(run[ahead].ids) == set(run[ahead + 1].ids) - set(chosen[2].ids)
    assert run[-1] == Op("discard", chosen[0].ids[:1])
    assert written.m3("bench", "eviction", "--trace", "trace.jsonl").code == 0


def test_each_process_adds_a_run_and_commands_that_read_nothing_add_none(written: Place) -> None:
    written.configure(recall={"trace": "./trace.jsonl"})
    for _ in range(2):
        assert written.m3("ask", "What does the harbour lamp burn?").code == 0
        assert written.m3("search", "lamp").code == 0
    assert len(read_trace(written.folder / "trace.jsonl").runs) == 2


def test_a_trace_that_cannot_be_recorded_is_named(written: Place) -> None:
    written.configure(recall={"trace": "./nowhere/trace.jsonl"})
    assert "nowhere/trace.jsonl" in written.m3("ask", "What does the lamp burn?").complaint
    written.configure(recall={"trace": "./m3.yaml"})
    before = written.file.read_bytes()
    assert "name another file" in written.m3("ask", "What does the lamp burn?").complaint
    assert written.file.read_bytes() == before
