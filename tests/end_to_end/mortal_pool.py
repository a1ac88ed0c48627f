"""A pool of encoders in this process, which die when they are told to."""

from collections import deque
from collections.abc import Callable, Sequence
from random import Random

import torch

from m3runtime.config.schema import Config
from m3runtime.writing.encoders.encoder import Encoded, Encoder, Failed, Setup, Task
from m3runtime.writing.encoders.pool import EncoderPool, Lost

Moment = Callable[[int], bool]
"""Does an encoder die now, over the group whose first id this is?"""


class MortalPool(EncoderPool):
    """Encoders of this process that answer in any order, and die when they are told to. It keeps to the contract."""

    def __init__(self, size: int, random: Random, dies: Moment = lambda _: False) -> None:
        self.size = size
        self.closed = 0
        self.killed = set[int]()
        """Encoders that die at their next task, whatever it is."""
        self._random = random
        self._dies = dies
        self._encoders: dict[int, tuple[Encoder, deque[Task]]] = {}

    def open(self, config: Config, device: torch.device) -> None:
        assert not self._encoders

    def start(self, number: int, setup: Setup) -> None:
        assert number in range(self.size)
        assert number not in self._encoders, "it is running"
        self._encoders[number] = Encoder(setup, "cpu", torch.get_num_threads()), deque()

    def give(self, number: int, task: Task) -> None:
        tasks = self._encoders[number][1]
        tasks.append(task)
        assert len(tasks) <= 2

    def wait(self) -> Sequence[tuple[int, Encoded | Failed | Lost]]:
        number = self._random.choice([number for number, (_, tasks) in self._encoders.items() if tasks])
        encoder, tasks = self._encoders[number]
        if number in self.killed or self._dies(int(tasks[0].ids[0])):
            self.killed.discard(number)
            del self._encoders[number]
            return [(number, Lost("Killed"))]
        return [(number, encoder.attempt(tasks.popleft()))]

    @property
    def living(self) -> int:
        """The number of encoders that have not ended."""
        return len(self._encoders.keys() - self.killed)

    def close(self) -> None:
        self._encoders.clear()
        self.killed.clear()
        self.closed += 1
