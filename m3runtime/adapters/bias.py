"""`BiasCalibrating`: an adapter that can fit bias directions to its model's queries.

An adapter needs no import to be one: it has the method.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from m3runtime.bank.bias import BiasDirections


@runtime_checkable
class BiasCalibrating(Protocol):
    """An adapter whose model's queries can be looked at."""

    @property
    def most_positions(self) -> int | None:
        """The number of tokens that a context after the memories may have, or None for any number."""

    def calibrate_bias(
        self, references: Sequence[str], length: int, progress: Callable[[int, int], None]
    ) -> BiasDirections:
        """Directions that the queries of a context of ``length`` tokens meet with nearly the same logit.

        They are fitted to the queries of half of the references, and measured on those of the other half.
        ``progress`` gets the tokens read, and all of them. Raises `InputError` for too few references, or more tokens
        than `most_positions`; and `ConfigError` that names the worst heads, if a null slot would be seen.
        """
