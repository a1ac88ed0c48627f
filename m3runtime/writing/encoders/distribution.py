"""`distribute`: lets a pool of encoders encode groups, and stores them in their order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from m3runtime.errors import EncoderError
from m3runtime.retrieval.embedder import Embedder
from m3runtime.writing.encoders.encoder import Encoded, Failed, Setup, Task
from m3runtime.writing.encoders.pool import EncoderPool, Lost
from m3runtime.writing.encoding import Group, Store
from m3runtime.writing.pipeline import Clock, Pipeline
from m3runtime.writing.worker import Worker

_GIVEN = 2
"""Most groups that an encoder has: one that it computes, and the next one."""
_HELD = 3
"""Most groups for each encoder that were made and are not stored. A slow one holds up those behind it."""
_MOST_DEATHS = 5
"""Deaths of encoders over the same group after which no other is tried."""


@dataclass(eq=False)
class _Job:
    """A group, until it is stored."""

    store: Store
    group: Group
    embed: bool
    """Is the encoder to embed?"""
    encoded: bool
    taken_back: bool = False
    """Had an encoder that died before it did this job?"""
    deaths: int = 0
    """Encoders that died while it was their turn to do this job."""

    @property
    def task(self) -> Task:
        return Task(self.group.ids, self.group.references, self.embed, read=self.store is not Group.catalogue)


def distribute(
    pool: EncoderPool,
    setup: Setup,
    pipeline: Pipeline,
    groups: Iterable[tuple[Store, Group]],
    computed: Callable[[int], None],
    embedder: Embedder | None = None,
) -> None:
    """Encode and embed groups by the encoders of an open pool, and store each in one transaction of this process.

    Groups are stored in order, under the ids that they came with. New references that were encoded while a transaction
    was made are committed together in the next one, since a store far away takes few large transactions better. If an
    encoder dies, another one gets what it had, and it is started again. ``computed`` is called with the references that
    have been encoded. With an ``embedder`` this process embeds, and encoders only read.

    Raises `EncoderError` if encoders die over the same group again and again, and what a task or a transaction raises;
    no group is stored after one that failed. Holds a few groups for each encoder.
    """
    with Worker(ahead=1) as commits:
        for store, some in _Distribution(pool, setup, pipeline.clock, computed, embedder).in_order(groups):
            commits.do(partial(pipeline.store, store, Group.joined(some)))


class _Distribution:
    def __init__(
        self,
        pool: EncoderPool,
        setup: Setup,
        clock: Clock,
        computed: Callable[[int], None],
        embedder: Embedder | None,
    ) -> None:
        self._pool = pool
        self._setup = setup
        self._clock = clock
        self._computed = computed
        self._embedder = embedder
        self._count = 0
        self._waiting: deque[_Job] = deque()
        self._given: dict[int, deque[_Job]] = {}
        """The jobs of each running encoder, in the order in which it does them."""
        self._ready = set[int]()
        """Encoders that have done a job."""

    def in_order(self, groups: Iterable[tuple[Store, Group]]) -> Iterator[tuple[Store, list[Group]]]:
        """All groups, encoded: those together that one transaction may store."""
        held: deque[_Job] = deque()
        coming = iter(groups)
        more = True
        while more or held:
            while more and len(held) < _HELD * self._pool.size:
                store, group = next(coming, (None, None))
                if store is None or group is None:
                    more = False
                    break
                held.append(_Job(store, group, self._embed(store, group), encoded=not group.references))
                if group.references:
                    self._waiting.append(held[-1])
                    self._give()  # making the next group takes a while
            self._give()
            if held and not held[0].encoded:
                for number, answer in self._pool.wait():
                    self._heard(number, answer)
            while held and held[0].encoded:
                job = held.popleft()
                some = [job.group]
                while job.store is Group.commit and _can_follow(held):
                    some.append(held.popleft().group)
                yield job.store, some

    def _embed(self, store: Store, group: Group) -> bool:
        """Embed a group here, if that is wanted. Returns whether an encoder is to do it."""
        if store is Group.fill or self._embedder is None:
            return store is not Group.fill
        if group.references:
            with self._clock.phase("embed"):
                group.embed(self._embedder)
        return False

    def _give(self) -> None:
        """Give waiting jobs to encoders that have room."""
        while self._waiting:
            number = self._free_for(self._waiting[0])
            if number is None:
                return
            if number not in self._given:
                self._pool.start(number, self._setup)
                self._given[number] = deque()
            job = self._waiting.popleft()
            self._given[number].append(job)
            self._pool.give(number, job.task)

    def _free_for(self, job: _Job) -> int | None:
        """The encoder with the fewest jobs, or None if none has room. Each is started before any gets a second job.

        A job that was taken back goes to one that has its model already, since the groups behind it wait for it.
        """

        def load(one: int) -> tuple[bool, int, bool]:
            return job.taken_back and one not in self._ready, len(self._given.get(one, ())), one not in self._given

        free = [one for one in range(self._pool.size) if len(self._given.get(one, ())) < _GIVEN]
        return min(free, key=load, default=None)

    def _heard(self, number: int, answer: Encoded | Failed | Lost) -> None:
        if isinstance(answer, Lost):
            self._lost(number, answer)
            return
        self._ready.add(number)
        job = self._given[number].popleft()
        if isinstance(answer, Failed):
            raise answer.raised()
        if answer.blocks is not None:
            job.group.blocks = torch.from_numpy(answer.blocks)
        if answer.vectors is not None:
            job.group.vectors = answer.vectors
        job.encoded = True
        self._clock.add(answer.seconds)
        self._count += len(job.group.references)
        self._computed(self._count)

    def _lost(self, number: int, answer: Lost) -> None:
        """Take back the jobs of a dead encoder: the others do them first."""
        jobs = self._given.pop(number)
        self._ready.discard(number)
        self._waiting.extendleft(reversed(jobs))
        for job in jobs:
            job.taken_back = True
        if not jobs:
            return
        jobs[0].deaths += 1  # it computed this one, or loaded its model for it
        if jobs[0].deaths == _MOST_DEATHS:
            one = jobs[0].group.references[0]
            raise EncoderError(
                f"{_MOST_DEATHS} encoders died over the same references, from {one.source} on; the last: "
                f"{answer.reason}. Is there memory for {self._pool.size} models? All that was committed stays"
            )


def _can_follow(held: deque[_Job]) -> bool:
    """Is the first job to be committed as new, like the one before?"""
    return bool(held) and held[0].encoded and held[0].store is Group.commit
