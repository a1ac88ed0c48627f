"""The scheduler in a world without tensors: each token is read once, with the memories that belong to it."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3model.engine.scheduler import STEP_TOKENS, Plan, Scheduled, Scheduler

CHUNK = 8


def expected_recalls(prompt: int, answer: int, chunk: int | None) -> list[int]:
    """The places at which one sequence recalls, spelt out token by token; the last token of an answer is not read."""
    if chunk is None:
        return []
    in_prompt = [place for place in range(prompt) if place % chunk == 0]
    return in_prompt + [prompt + count - 1 for count in range(1, answer) if count % chunk == 0]


class World:
    """Runs a scheduler as an engine does; what is drawn is known after ``late`` further steps."""

    def __init__(self, rows: int, room: int, *, late: int) -> None:
        self.scheduler = Scheduler(rows, lambda count, tokens: count * tokens <= room)
        self.rows, self.room, self.late = rows, room, late
        self.all: list[Scheduled] = []
        self.read: dict[int, list[int]] = {}
        self.recalls: dict[int, list[int]] = {}
        self.under_way: list[list[Scheduled]] = []
        self.steps = 0

    def add(self, prompt: int, limit: int, chunk: int | None) -> None:
        one = Scheduled(list(range(prompt)), limit, chunk)
        self.all.append(one)
        self.scheduler.add(one)

    def recall(self, one: Scheduled) -> None:
        """A recall ends."""
        one.recalling = False
        one.recalled = one.read
        known = self.recalls.setdefault(id(one), [])
        if not known or one.read > max(known):
            known.append(one.read)

    def turn(self, pick: Callable[[int], int]) -> None:
        """One round. ``pick(n)`` chooses among n: how many of the recalls under way end."""
        scheduler = self.scheduler
        for one in scheduler.admit():
            self.read[id(one)] = []  # from the beginning, the first time and again
        for one in scheduler.due():
            one.recalling = True
        plan = scheduler.plan(most_reading=2)
        self.check(plan)
        for one in plan.decoding:
            self.read[id(one)].append(one.read)
        for part in plan.reading:
            self.read[id(part.sequence)] += range(part.start, part.end)
        drawing = list(plan.sequences)
        scheduler.launched(plan)
        self.steps += bool(plan.decoding or plan.reading)
        self.under_way.append(drawing)
        while len(self.under_way) > self.late or (self.under_way and not (plan.decoding or plan.reading)):
            for one in self.under_way.pop(0):
                self.know(one)
        recalling = [one for one in scheduler.running if one.recalling]
        for one in recalling[: pick(len(recalling))]:
            self.recall(one)

    def know(self, one: Scheduled) -> None:
        if one.ended:
            return
        one.answer.append(len(one.answer))
        if len(one.answer) == one.limit:
            self.scheduler.end(one)
            self.scheduler.compact()

    def check(self, plan: Plan) -> None:
        running = self.scheduler.running
        rows = sorted(one.row for one in running if one.row is not None)
        assert len(set(rows)) == len(running) <= self.rows
        assert not any(one.recalling or one.due for one in plan.decoding)
        for part in plan.reading:
            one = part.sequence
            assert part.start == one.read < part.end <= one.total
            assert not one.recalling
            assert not one.due
            if one.chunk and part.end - part.start > 1:  # no place within it begins a chunk
                places = expected_recalls(len(one.prompt), one.limit, one.chunk)
                assert not set(range(part.start + 1, part.end)) & set(places)
            if plan.decoding:
                assert part.end - part.start <= STEP_TOKENS
        if len(running) > 1:
            longest = max(max(one.read + 1, one.total) for one in running)
            busy = any(one.recalling or len(one.answer) < one.drawn for one in running)
            assert busy or len(running) * longest <= self.room


SEQUENCES = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 30), st.sampled_from([None, CHUNK])), min_size=1, max_size=7
)


@given(SEQUENCES, st.integers(1, 4), st.integers(70, 300), st.integers(0, 1), st.data())
@settings(max_examples=150, deadline=None)
def test_everything_is_read_once_and_with_its_memories(
    sequences: list[tuple[int, int, int | None]], rows: int, room: int, late: int, data: st.DataObject
) -> None:
    world = World(rows, room, late=late)
    pending = list(sequences)
    for _ in range(4000):
        if pending and (not world.all or data.draw(st.booleans())):
            world.add(*pending.pop(0))
        idle = not pending and all(one.recalling for one in world.scheduler.running)
        world.turn(lambda n, idle=idle: max(bool(n), 0) if idle else data.draw(st.integers(0, n)))  # type: ignore[misc]
        if not pending and all(one.ended for one in world.all):
            break
    for one, (prompt, limit, chunk) in zip(world.all, sequences, strict=True):
        assert len(one.answer) == limit
        assert world.read[id(one)] == list(range(prompt + limit - 1))
        assert world.recalls.get(id(one), []) == expected_recalls(prompt, limit, chunk)
    assert not world.scheduler.running
    assert not world.scheduler.waiting


def test_who_came_first_is_served_first() -> None:
    world = World(2, 10_000, late=0)
    for _ in range(5):
        world.add(20, 6, CHUNK)
    ended: list[int] = []
    while len(ended) < 5:
        world.turn(lambda n: n)
        ended += [i for i, one in enumerate(world.all) if one.ended and i not in ended]
    assert ended == sorted(ended)


def test_a_prompt_is_read_in_parts_while_others_decode() -> None:
    world = World(2, 10_000, late=0)
    world.add(3, 40, None)
    for _ in range(4):
        world.turn(lambda n: n)
    before = len(world.all[0].answer)
    world.add(4 * STEP_TOKENS, 2, None)
    for _ in range(4):
        world.turn(lambda n: n)
    assert len(world.all[0].answer) == before + 4
    assert world.all[1].read == 4 * STEP_TOKENS


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_in_use_are_the_first(rows: int) -> None:
    world = World(rows, 10_000, late=0)
    for length in (2, 9, 4, 12, 3):
        world.add(5, length, None)
    while not all(one.ended for one in world.all):
        world.turn(lambda n: n)
        used = sorted(one.row for one in world.scheduler.running if one.row is not None)
        assert used == list(range(len(used)))


def test_where_contexts_outgrow_their_room_the_youngest_waits() -> None:
    world = World(3, 60, late=0)
    for _ in range(3):
        world.add(5, 30, None)
    while not all(one.ended for one in world.all):
        world.turn(lambda n: n)
    assert world.scheduler.preempted
    assert [len(one.answer) for one in world.all] == [30] * 3
