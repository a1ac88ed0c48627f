"""Pools of encoders with one mistake each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import ClassVar

import pytest
import torch

from m3runtime.config.schema import Config
from m3runtime.testing.encoders import EncoderPoolContract, MakePool
from m3runtime.writing.encoders.encoder import Encoded, Failed, Setup, Task
from m3runtime.writing.encoders.pool import EncoderPool, Lost
from tests.end_to_end.encoders import configured
from tests.end_to_end.mortal_pool import MortalPool
from tests.testing.broken.suites import make_suites

Answers = Sequence[tuple[int, Encoded | Failed | Lost]]


class DoesTheLastTaskFirst(MortalPool):
    def give(self, number: int, task: Task) -> None:
        super().give(number, task)
        self._encoders[number][1].rotate()


class SaysThatAnotherDidIt(MortalPool):
    def wait(self) -> Answers:
        return [((number + 1) % self.size, answer) for number, answer in super().wait()]


class AnswersFromAStore(MortalPool):
    """Its arrays cannot be written."""

    def wait(self) -> Answers:
        found = super().wait()
        for _, answer in found:
            if isinstance(answer, Encoded) and answer.vectors is not None:
                answer.vectors.flags.writeable = False
        return found


class LeavesOutWhatWasNotAskedFor(MortalPool):
    """Gives catalogued references blocks of zeros."""

    def wait(self) -> Answers:
        return [
            (number, replace(one, blocks=torch.zeros(2, 8, dtype=torch.uint8).numpy()))
            if isinstance(one, Encoded) and one.blocks is None
            else (number, one)
            for number, one in super().wait()
        ]


class RaisesAnErrorItself(MortalPool):
    def wait(self) -> Answers:
        found = super().wait()
        for _, answer in found:
            if isinstance(answer, Failed):
                raise answer.raised()
        return found


class TakesAnErrorForADeath(MortalPool):
    def wait(self) -> Answers:
        found = super().wait()
        return [(number, Lost(one.message) if isinstance(one, Failed) else one) for number, one in found]


class TellsOfADeathTwice(MortalPool):
    again: Answers = ()

    def wait(self) -> Answers:
        if again := self.again:
            self.again = ()
            return again
        found = super().wait()
        self.again = [(number, one) for number, one in found if isinstance(one, Lost)]
        return found


class KeepsTheTasksOfTheDead(MortalPool):
    """The encoder that is started in its place gets them."""

    left: Mapping[int, Sequence[Task]] = {}

    def wait(self) -> Answers:
        before = {number: list(tasks) for number, (_, tasks) in self._encoders.items()}
        found = super().wait()
        self.left = {**self.left, **{number: before[number] for number, one in found if isinstance(one, Lost)}}
        return found

    def start(self, number: int, setup: Setup) -> None:
        super().start(number, setup)
        self._encoders[number][1].extend(self.left.get(number, ())[:1])


class LetsThemFinish(MortalPool):
    def close(self) -> None:
        self.closed += 1


class Pools(EncoderPoolContract):
    kind: ClassVar[type[MortalPool]]
    patience = 1.0

    @pytest.fixture(scope="class")
    @classmethod
    def make_pool(cls) -> MakePool:
        return lambda: cls.kind(3, Random(5))

    @pytest.fixture(scope="class")
    @staticmethod
    def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
        return Config.load(configured(tmp_path_factory.mktemp("pool")), environ={})

    def kill(self, pool: EncoderPool, number: int) -> None:
        assert isinstance(pool, MortalPool)
        pool.killed.add(number)

    def living(self, pool: EncoderPool) -> int:
        assert isinstance(pool, MortalPool)
        return pool.living


BROKEN = MortalPool.__subclasses__()
globals().update(make_suites(Pools, __name__, MortalPool, BROKEN))
