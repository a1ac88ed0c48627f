"""`BankServer`: a process that recalls from a made bank, by the queries of `MadeEmbedder`, and tells its memory."""

import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from m3runtime.config.schema import Config
from m3runtime.lab.bench.recall import OURS, timed_recall
from m3runtime.lab.bench.synthetic import around
from m3runtime.lab.bench.timing import threads
from m3runtime.retrieval.embedder import Embedder, Embeddings
from m3runtime.runtime import Runtime

_CENTRES = 5000
_FIRST_QUERY = 10**9
"""A seed above those of all references."""


class MadeEmbedder(Embedder):
    """Gives a text that ends with a number a vector near one of 5,000 random ones, where the references lie, too."""

    def __init__(self, path: str, *, dim: int) -> None:  # noqa: ARG002 - there is no file
        self._dim = dim

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._dim

    @property
    def fingerprint(self) -> str:
        """Thirty-two hex digits; see `Embedder.fingerprint`."""
        return f"{self._dim:032x}"

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        """``float32[n, dim]``; see `Embedder.embed_references`."""
        seeds = [_FIRST_QUERY + int(text.split()[-1]) for text in texts]
        return np.concatenate([around(centres_of(self._dim), 1, seed) for seed in seeds])

    def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        """``float32[n, dim]``; see `Embedder.embed_queries`."""
        return self.embed_references(texts)


@dataclass(frozen=True, slots=True)
class Opened:
    """The opening of a bank."""

    seconds: float
    cpu_s: float
    before_bytes: int
    """Most memory that the process had before: Python and its libraries."""


@dataclass(frozen=True, slots=True)
class RecallTime:
    """One recall: the ids, and the seconds that it took without the embedding of its text."""

    ids: tuple[int, ...]
    search_s: float
    recall_s: float
    cpu_s: float


class BankServer:
    """A process that has a bank open, read-only, and recalls from it."""

    def __init__(self, config: Config, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(config, threads, other), daemon=True)
        self._process.start()
        other.close()
        self.opened: Opened = self._connection.recv()

    def recall(self, number: int) -> RecallTime:
        """Recall for the query of this number."""
        self._connection.send(number)
        found: RecallTime = self._connection.recv()
        return found

    def end(self) -> int:
        """Let it end. Returns the most memory that it had, in bytes."""
        self._connection.send(None)
        peak: int = self._connection.recv()
        return peak

    def __enter__(self) -> "BankServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()


@cache
def centres_of(dim: int) -> Embeddings:
    """The vectors that made ones lie near."""
    vectors = np.random.default_rng(0).standard_normal((_CENTRES, dim), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # type: ignore[no-any-return]


def _serve(config: Config, count: int, connection: "Connection[Any, Any]") -> None:
    """Open a bank, and recall for each number that comes, until None comes."""
    before, began, cpu = _peak_bytes(), time.perf_counter(), time.process_time()
    with threads(count), Runtime.open(config, read_only=True) as runtime:
        connection.send(Opened(time.perf_counter() - began, time.process_time() - cpu, before))
        while (number := connection.recv()) is not None:
            cpu = time.process_time()
            recalled, phases = timed_recall(runtime, f"query {number}")
            cpu = time.process_time() - cpu
            connection.send(RecallTime(tuple(recalled.ids), phases["search"], phases[OURS], cpu))
            runtime.store.forget(recalled.ids)  # so that no later recall finds them decoded
        connection.send(_peak_bytes())


def _peak_bytes() -> int:
    """The most memory that this process had."""
    if sys.platform == "linux":  # `getrusage` counts that of the parent, too
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
