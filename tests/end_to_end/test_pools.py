"""The pools of encoders against their contract: in this process, in others, and on a Ray cluster."""

import os
import signal
import sys
from pathlib import Path
from random import Random
from typing import cast

import pytest
import torch

from m3runtime.cli.write import pool_of
from m3runtime.config.schema import Config
from m3runtime.testing.encoders import TASKS, EncoderPoolContract, MakePool, Opened
from m3runtime.writing.encoders.encoder import Setup
from m3runtime.writing.encoders.pool import EncoderPool, Lost
from m3runtime.writing.encoders.processes import ProcessPool
from tests.end_to_end.encoders import actors_of, children, configured
from tests.end_to_end.mortal_pool import MortalPool

CPU = torch.device("cpu")


class OfWords(EncoderPoolContract):
    """With the smallest model."""

    @pytest.fixture(scope="class")
    @staticmethod
    def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
        return Config.load(configured(tmp_path_factory.mktemp("pool")), environ={})


class TestMortalPool(OfWords):
    """The pool that other tests use keeps the contract, too."""

    @pytest.fixture(scope="class")
    @staticmethod
    def make_pool() -> MakePool:
        return lambda: MortalPool(3, Random(5))

    def kill(self, pool: EncoderPool, number: int) -> None:
        assert isinstance(pool, MortalPool)
        pool.killed.add(number)

    def living(self, pool: EncoderPool) -> int:
        assert isinstance(pool, MortalPool)
        return pool.living


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
class TestProcessPool(OfWords):
    @pytest.fixture(scope="class")
    @staticmethod
    def make_pool() -> MakePool:
        return lambda: ProcessPool(2)

    def kill(self, pool: EncoderPool, number: int) -> None:
        assert isinstance(pool, ProcessPool)
        os.kill(pool._running[number].process.pid, signal.SIGKILL)

    def living(self, pool: EncoderPool) -> int:
        return len(children(os.getpid()))


@pytest.mark.scale
class TestRayPool(OfWords):
    @pytest.fixture(scope="class")
    @staticmethod
    def make_pool() -> MakePool:
        pool = pytest.importorskip("m3backends.ray.pool")
        return lambda: cast("EncoderPool", pool.RayPool(address="local", size=2))

    def kill(self, pool: EncoderPool, number: int) -> None:
        import ray

        ray.kill(pool._actors[number].handle)  # type: ignore[attr-defined]

    def living(self, pool: EncoderPool) -> int:
        return len(actors_of(os.getpid()))

    def test_actors_of_a_cluster_of_our_own_have_our_niceness(self, opened: Opened, setup: Setup) -> None:
        opened.start(setup)
        opened.pool.give(0, TASKS[0])
        opened.answers({0: 1})
        (found,) = {os.getpriority(os.PRIO_PROCESS, actor) for actor in actors_of(os.getpid())}
        assert found == os.getpriority(os.PRIO_PROCESS, 0)


def test_a_process_that_cannot_read_its_task_says_so(tmp_path: Path) -> None:
    with ProcessPool(1) as pool:
        pool.open(Config.model_validate({"bank": "b", "model": {"path": "m"}, "embedder": {"path": "e"}}), CPU)
        pool.start(0, cast("Setup", None))
        pool._running[0].connection.send_bytes(b"no pickle")
        ((number, answer),) = pool.wait()
    assert number == 0
    assert isinstance(answer, Lost)
    assert answer.reason.startswith("exit status 1: ")
    assert "UnpicklingError" in answer.reason


def test_one_worker_is_the_writer_itself() -> None:
    assert pool_of(None, None) is pool_of(1, None) is None
    pool = pool_of(3, None)
    assert isinstance(pool, ProcessPool)
    assert pool.size == 3
