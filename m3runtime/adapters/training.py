"""The `Trainer` contract: what makes a model learn to read memories, and its reports."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from m3runtime.config.schema import Config


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage of training that is done."""

    name: str
    """``warmup`` or ``memory``."""
    steps: int
    losses: tuple[tuple[int, float], ...]
    """Steps, and the mean loss of predicting a token, in nats, over the steps since the one before."""
    path: str
    """The folder of the model after this stage."""


@dataclass(frozen=True, slots=True)
class TrainReport:
    """A training that is done."""

    stages: tuple[StageReport, ...]
    path: str
    """The folder of the trained model, for ``model.path``."""
    sequences: int
    tokens: int
    """The number of tokens in all sequences."""
    references: int
    retrieving: float
    """Share of chunks that retrieved a reference."""


class Trainer(ABC):
    """Trains the models of one kind of adapter, whose name it has among the plug-ins (group ``m3runtime.trainers``).

    It is a plug-in of its own, so that an adapter loads none of what training needs.
    """

    @abstractmethod
    def train(self, config: "Config", progress: "Callable[[str, int, int], None]") -> TrainReport:
        """Train as ``config.train`` says, or resume an equal run that stopped; see `m3 train`.

        ``progress`` is called with the title of a task, its steps done, and all its steps.
        Raises `ConfigError`, and `InputError` for texts without anything to learn from.
        """
