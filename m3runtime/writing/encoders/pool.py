"""`EncoderPool`: the contract of a set of encoders, each of which may die at any moment."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch

    from m3runtime.config.schema import Config
    from m3runtime.writing.encoders.encoder import Encoded, Failed, Setup, Task


@dataclass(frozen=True, slots=True)
class Lost:
    """An encoder died, and with it all tasks that it was given and has not answered."""

    reason: str
    """How it ended, in a few words."""


class EncoderPool(ABC):
    """Encoders with the numbers from 0 to ``size - 1``. A context manager; may be opened again.

    All methods are called by one thread, the writer's. None but `open` and `wait` takes long.
    """

    size: int
    """The number of encoders; known once the pool is open."""

    @abstractmethod
    def open(self, config: "Config", device: "torch.device") -> None:
        """Reach what the encoders run on; starts none. ``device`` is the writer's. Raises `ConfigError`."""

    @abstractmethod
    def start(self, number: int, setup: "Setup") -> None:
        """Start an encoder, or start it again after it was lost. It loads its model when it gets its first task."""

    @abstractmethod
    def give(self, number: int, task: "Task") -> None:
        """Queue a task for an encoder that was started. If it is dead, `wait` tells."""

    @abstractmethod
    def wait(self) -> "Sequence[tuple[int, Encoded | Failed | Lost]]":
        """Wait until encoders have answered, and return the answers with their numbers, each encoder's in order.

        At least one encoder must have a task. The arrays of an answer are the caller's to write.
        """

    @abstractmethod
    def close(self) -> None:
        """End all encoders at once, whatever they do. Closing twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
