"""`Comparable`: an adapter whose model also runs without anything of ours, as the baseline of benchmarks.

An adapter needs no import to be one: it has the methods.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.base import Adapter


class PlainRun(Protocol):
    """The continuations of a batch of prompts by a model alone."""

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """The tokens after each prompt, exactly as many as requested."""

    @property
    def first_token_s(self) -> float:
        """Seconds from the call to the first tokens."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole call."""


class Baseline(Protocol):
    """A model as its own library runs it: what benchmarks compare with."""

    variants: tuple[str, ...]
    """Ways in which the library can run it, such as its kinds of attention and of caches."""
    weight_bytes: int
    """Bytes of weights that a decoding step reads."""

    def generate(self, prompts: Sequence[Prompt], new_tokens: int, variant: str, room: int) -> PlainRun:
        """Continue each prompt by the likeliest tokens, exactly ``new_tokens`` of them, whatever they are.

        ``room`` is how many tokens, the prompt's included, a cache of fixed size is made for. Raises what the library
        raises for a variant that cannot be run here.
        """

    def endless(self) -> Adapter:
        """An adapter of the same loaded model, at whose tokens no answer ends."""


@runtime_checkable
class Comparable(Protocol):
    """An adapter whose model can also be run without anything of ours."""

    def baseline(self) -> Baseline:
        """The model as its library runs it. One call at a time: the adapter's or the baseline's."""
