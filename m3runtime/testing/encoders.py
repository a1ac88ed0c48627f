"""`EncoderPoolContract`: the laws of every `EncoderPool`."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.documents.reference import Place, Reference
from m3runtime.errors import M3Error
from m3runtime.memory.block import as_ids
from m3runtime.writing.encoders.encoder import Encoded, Encoder, Failed, Setup, Task
from m3runtime.writing.encoders.pool import EncoderPool, Lost
from m3runtime.writing.pipeline import PHASES
from m3runtime.writing.writer import Writer

MakePool = Callable[[], EncoderPool]
"""Makes a pool of at least two encoders, not open."""
Answer = Encoded | Failed | Lost


def task_of(first: int, count: int, *, embed: bool = True, read: bool = True) -> Task:
    """A task of short texts, each unlike the others."""
    ids = as_ids(range(first, first + count))
    texts = [f"Keeper {id} lit the lamp on day {id * 37 % 1000}." for id in ids.tolist()]
    references = [Reference(text, 8, places=(Place("log.txt", 0, len(text)),)) for text in texts]
    return Task(ids, references, embed, read)


TASKS = (
    task_of(0, 3),
    task_of(3, 1),
    task_of(4, 2, embed=False),  # of references that were catalogued before
    task_of(6, 2, read=False),  # that are catalogued now
)
WRONG = replace(task_of(8, 2), ids=as_ids([8]))
"""A task that raises an error, which is not one of our own."""


@dataclass(eq=False)
class Opened:
    """A pool, and which encoders run."""

    pool: EncoderPool
    config: Config
    running: set[int] = field(default_factory=set)
    is_open: bool = False

    def start(self, setup: Setup) -> range:
        """Open the pool and start what does not run. Returns the numbers of all encoders."""
        if not self.is_open:
            self.pool.open(self.config, torch.device("cpu"))
            self.is_open = True
        for number in set(range(self.pool.size)) - self.running:
            self.pool.start(number, setup)
            self.running.add(number)
        return range(self.pool.size)

    def close(self) -> None:
        self.pool.close()
        self.running.clear()
        self.is_open = False

    def answers(self, of: dict[int, int]) -> dict[int, list[Answer]]:
        """Wait for so many answers of each encoder; one that is lost answers no more."""
        found: dict[int, list[Answer]] = {number: [] for number in of}
        while any(
            len(found[number]) < count and not any(isinstance(one, Lost) for one in found[number])
            for number, count in of.items()
        ):
            for number, answer in self.pool.wait():
                found[number].append(answer)
                if isinstance(answer, Lost):
                    self.running.discard(number)
        return found


class EncoderPoolContract(ABC):
    """Laws of `EncoderPool`. A subclass has two fixtures of scope ``class``, and two back doors.

    ``config`` is that of a bank that is not there yet, with a model and an embedder that every encoder can load. Their
    results must not depend on the number of threads. One pool serves all tests, since starting encoders takes seconds.

    ::

        class TestMine(EncoderPoolContract):
            @pytest.fixture(scope="class")
            @staticmethod
            def make_pool() -> MakePool:
                return lambda: MyPool(size=2)

            @pytest.fixture(scope="class")
            @staticmethod
            def config(tmp_path_factory) -> Config: ...
    """

    patience = 30.0
    """Seconds in which encoders end after `EncoderPool.close`: a process that was killed is there for a moment."""

    @abstractmethod
    def kill(self, pool: EncoderPool, number: int) -> None:
        """Kill a running encoder without the pool's doing, as a machine does that has no memory left."""

    @abstractmethod
    def living(self, pool: EncoderPool) -> int:
        """The number of encoders that have not ended, as the system sees it."""

    @pytest.fixture(scope="class")
    @staticmethod
    def setup(config: Config) -> Setup:
        """The configuration of a bank that is made for the encoders, with all that they need of it."""
        adapter, embedder = assembly.open_adapter(config), assembly.open_embedder(config)
        Writer(config, adapter, embedder).write([Document("log.txt", "The keepers keep a log.")])
        bank = assembly.open_bank(config, read_only=True)
        try:
            return Setup.of(config, bank)
        finally:
            bank.close()
            embedder.close()
            adapter.close()

    @pytest.fixture(scope="class")
    @staticmethod
    def opened(make_pool: MakePool, config: Config) -> Iterator[Opened]:
        """One pool for all tests."""
        with make_pool() as pool:
            yield Opened(pool, config)

    @pytest.fixture(scope="class")
    @staticmethod
    def expected(setup: Setup) -> list[Encoded]:
        """The results of `TASKS`."""
        encoder = Encoder(setup, "cpu", torch.get_num_threads())
        found = [encoder.attempt(task) for task in TASKS]
        return [one for one in found if isinstance(one, Encoded)]

    def test_each_encoder_answers_its_tasks_in_order(
        self, opened: Opened, setup: Setup, expected: Sequence[Encoded]
    ) -> None:
        numbers = opened.start(setup)
        assert len(numbers) > 1, "a pool of two encoders at least"
        orders = {number: [(number + place) % len(TASKS) for place in range(len(TASKS))] for number in numbers}
        for half in (slice(0, 2), slice(2, 4)):  # a writer gives an encoder two at once
            for place in range(2):
                for number in numbers:
                    opened.pool.give(number, TASKS[orders[number][half][place]])
            for number, answers in opened.answers(dict.fromkeys(numbers, 2)).items():
                for answer, which in zip(answers, orders[number][half], strict=True):
                    check(answer, expected[which])

    def test_an_error_is_an_answer_and_the_encoder_goes_on(
        self, opened: Opened, setup: Setup, expected: Sequence[Encoded]
    ) -> None:
        last = opened.start(setup)[-1]
        told = Encoder(setup, "cpu", torch.get_num_threads()).attempt(WRONG)
        assert isinstance(told, Failed)
        opened.pool.give(last, WRONG)
        opened.pool.give(last, TASKS[0])
        failed, answer = opened.answers({last: 2})[last]
        assert isinstance(failed, Failed)
        assert (failed.kind, failed.message) == (None, told.message)
        assert failed.trace
        check(answer, expected[0])

    def test_a_dead_encoder_is_lost_once_and_others_go_on(
        self, opened: Opened, setup: Setup, expected: Sequence[Encoded]
    ) -> None:
        numbers = opened.start(setup)
        for number in numbers:
            opened.pool.give(number, TASKS[0])
        self.kill(opened.pool, 0)
        for number in numbers:  # number 0 has this one whether it had done the first or not
            opened.pool.give(number, TASKS[1])
        answers = opened.answers(dict.fromkeys(numbers, 2))
        for number, some in answers.items():
            before = some[:-1] if number == 0 else some
            for answer, wanted in zip(before, expected[: len(before)], strict=True):
                check(answer, wanted)
        lost = answers[0][-1]
        assert isinstance(lost, Lost)
        assert lost.reason
        assert "\n" not in lost.reason
        opened.start(setup)  # again, in its place
        opened.pool.give(0, TASKS[1])
        (answer,) = opened.answers({0: 1})[0]
        check(answer, expected[1])

    def test_a_task_for_a_dead_encoder_is_lost_with_it(self, opened: Opened, setup: Setup) -> None:
        numbers = opened.start(setup)
        opened.pool.give(1, TASKS[0])
        opened.answers({1: 1})
        self.kill(opened.pool, 1)
        opened.pool.give(1, TASKS[0])
        opened.pool.give(1, TASKS[1])
        (lost,) = opened.answers({1: 1})[1]
        assert isinstance(lost, Lost)
        opened.pool.give(numbers[0], TASKS[0])  # nothing more is told of it
        assert [type(one) for one in opened.answers({0: 1})[0]] == [Encoded]

    def test_closing_ends_encoders_at_work_and_the_pool_may_be_opened_again(self, opened: Opened, setup: Setup) -> None:
        for number in opened.start(setup):
            opened.pool.give(number, task_of(0, 64))
            opened.pool.give(number, TASKS[0])
        opened.close()
        until = time.monotonic() + self.patience
        while self.living(opened.pool) and time.monotonic() < until:
            time.sleep(0.05)
        assert not self.living(opened.pool)
        opened.close()
        with opened.pool:
            opened.start(replace(setup, manifest=b"none"))
            opened.pool.give(0, TASKS[0])
            (failed,) = opened.answers({0: 1})[0]  # and nothing of what was given before
        opened.close()
        assert isinstance(failed, Failed)
        assert isinstance(failed.raised(), M3Error), "an error of our own is the same in the writer"


def check(answer: Answer, expected: Encoded) -> None:
    """An answer is what the writer itself would have computed, and the writer's own."""
    assert isinstance(answer, Encoded), answer
    for one, other in ((answer.blocks, expected.blocks), (answer.vectors, expected.vectors)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)
            assert one.flags.writeable
    assert set(answer.seconds) <= set(PHASES)
    assert min(answer.seconds.values()) >= 0
