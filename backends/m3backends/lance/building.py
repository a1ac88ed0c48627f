"""The building of an index, also by several processes, each with some of the table's fragments.

The lists' centres and the rotation of all vectors are chosen first. The rest of the work is one row at a time, so the
parts that processes make are joined to the index that one would have made.
"""

import logging
import math
import multiprocessing
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

from lance.indices import IndicesBuilder

from m3backends.lance.coverage import NAME
from m3backends.lance.library import lance

log = logging.getLogger("m3runtime")

_SAMPLES = 64
"""Rows for each list that its centre is chosen by."""
_ROUNDS = 10
"""Rounds of choosing centres. With 256 rows and 25 rounds as many of the nearest lay in the same number of lists."""


@dataclass(frozen=True)
class Plan:
    """The centres, rotation and bits that all parts of an index have in common."""

    centres: Any
    """An Arrow array of the lists' centres."""
    rotation: str
    bits: int


def plan(dataset: Any, rows: int, bits: int) -> Plan:
    """Choose the centres of about as many lists as the square root of all rows, and a rotation at random."""
    lists = max(1, math.isqrt(rows))
    builder = IndicesBuilder(dataset, "embedding")
    trained = builder.train_ivf(
        num_partitions=lists,
        distance_type="cosine",
        sample_rate=max(2, min(_SAMPLES, rows // lists)),
        max_iters=_ROUNDS,
    )
    rotation = lance.lance.indices.build_rq_model(builder.dimension, bits)
    return Plan(trained.centroids, rotation, bits)


def build(dataset: Any, chosen: Plan, workers: int = 1) -> None:
    """Build the index as planned, and put it in the place of the one before, in one step.

    A process that dies leaves at most files that no version names. Its fragments are then done by this one.
    """
    numbers = [one.fragment_id for one in dataset.get_fragments()]
    shares = [share for first in range(workers) if (share := numbers[first::workers])]
    threads = max(1, len(os.sched_getaffinity(0)) // len(shares))
    with ExitStack() as stack:
        others = [(share, stack.enter_context(_Builder(dataset, chosen, share, threads))) for share in shares[1:]]
        parts = [part_of(dataset, chosen, shares[0])]
        parts += [other.part() or part_of(dataset, chosen, share) for share, other in others]
    whole = parts if len(parts) == 1 else [dataset.merge_existing_index_segments(parts)]
    dataset.commit_existing_index_segments(NAME, "embedding", whole)


def part_of(dataset: Any, chosen: Plan, fragments: Sequence[int]) -> Any:
    """A part of the index for these fragments, which no version has yet."""
    return dataset.create_index_uncommitted(
        "embedding",
        "IVF_RQ",
        name=NAME,
        metric="cosine",
        replace=True,
        num_partitions=len(chosen.centres),
        ivf_centroids=chosen.centres,
        num_bits=chosen.bits,
        rabitq_model=chosen.rotation,
        fragment_ids=list(fragments),
    )


class _Builder:
    """A process that makes a part. It is killed when the context ends."""

    def __init__(self, dataset: Any, chosen: Plan, fragments: Sequence[int], threads: int) -> None:
        spawning = multiprocessing.get_context("spawn")  # Lance's threads do not survive a fork
        self._answer, theirs = spawning.Pipe(duplex=False)
        given = theirs, dataset.uri, dataset.version, chosen, fragments, threads
        self._process = spawning.Process(target=make_part, args=given, daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._answer.close()

    def part(self) -> Any:
        """The part, when it is made; None if the process died."""
        try:
            return self._answer.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            log.warning("a process that built a part of the index ended with %s; its part is built here", code)
            return None


def make_part(answer: Connection, uri: str, version: int, chosen: Plan, fragments: Sequence[int], threads: int) -> None:
    """Make a part in a process of its own, and send it."""
    os.environ["LANCE_CPU_THREADS"] = str(threads)
    answer.send(part_of(lance.dataset(uri, version=version), chosen, fragments))
