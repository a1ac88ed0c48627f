"""`Pipeline`: takes groups of references through model, codec, embedder and home, in up to four threads."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from m3runtime.adapters.base import Adapter
from m3runtime.device.side_stream import SideStream
from m3runtime.retrieval.embedder import Embedder
from m3runtime.writing.encoding import Encoding, Group, Store, batches
from m3runtime.writing.worker import Job, Worker

if TYPE_CHECKING:
    from torch import Tensor

_BATCHES_AHEAD = 2
"""Most batches of memories that wait to be encoded: on an accelerator they take its memory."""

PHASES = ("split", "codec", "model", "encode", "embed", "commit", "index")
"""Phases of writing: split documents, train or load the codec, compute memories, encode them, embed, commit, index."""


class Clock:
    """Seconds by phase. Each phase is the work of one thread at a time."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the block for this phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of another clock."""
        for name, more in seconds.items():
            self.seconds[name] += more


@dataclass(frozen=True, slots=True)
class _Threads:
    """Where jobs are done: each function gives one away, or does it."""

    encode: Callable[[Job], object]
    embed: Callable[[Job], object]
    embedded: Callable[[], None]
    """Waits until all is embedded."""


class Pipeline:
    """Runs groups through the phases from ``model`` to ``commit``. A few groups are in memory at a time.

    The model runs in the caller's thread. While it computes a group, another thread commits the one before. With
    ``parallel`` a third thread encodes the last batches of the model in the meantime, and a fourth embeds the group: on
    an accelerator each on a stream of its own.
    """

    def __init__(self, adapter: Adapter, embedder: Embedder, clock: Clock, *, batch_size: int, parallel: bool) -> None:
        self._adapter = adapter
        self._embedder = embedder
        self.clock = clock
        self._batch_size = batch_size
        self._parallel = parallel
        self.bytes = 0
        """Bytes of the blocks that were stored."""
        self._stream = SideStream(adapter.device)

    def run(self, groups: "Iterable[tuple[Store, Group]]", computed: Callable[[int], None]) -> None:
        """Compute, encode, embed and store each group in one transaction.

        ``computed`` is called with the references that have passed the model (or were catalogued, which needs no
        model). Raises what a phase raises; groups are stored in order, and none after one that failed.
        """
        count = 0

        def passed(more: int) -> None:
            nonlocal count
            computed(count := count + more)

        with ExitStack() as workers:
            commits = workers.enter_context(Worker(ahead=1))
            threads = self._threads(workers)
            for store, group in groups:
                passed(0)
                embed, read = store is not Group.fill, store is not Group.catalogue
                self._compute(group, threads, passed, embed=embed, read=read)
                threads.encode(partial(commits.do, partial(self.store, store, group)))

    def compute(self, encoding: Encoding, *, embed: bool = True, read: bool = True) -> None:
        """Compute one group that another process will store; ``read``: by the model."""
        with ExitStack() as workers:
            self._compute(encoding, self._threads(workers), lambda _: None, embed=embed, read=read)

    def store(self, store: Store, group: Group) -> None:
        """Make the transaction of a computed group. For one thread at a time."""
        with self.clock.phase("commit"):
            store(group)
        self.bytes += 0 if store is Group.catalogue else group.bytes

    def _threads(self, workers: ExitStack) -> _Threads:
        """In turn, or in threads that end with ``workers``."""
        if not self._parallel:
            return _Threads(lambda job: job(), lambda job: job(), lambda: None)
        embeds = workers.enter_context(Worker(ahead=1))
        return _Threads(workers.enter_context(Worker(ahead=_BATCHES_AHEAD)).do, embeds.do, embeds.finish)

    def _compute(
        self,
        group: Encoding,
        threads: _Threads,
        passed: Callable[[int], None],
        *,
        embed: bool,
        read: bool,
    ) -> None:
        if group.references and embed:
            threads.embed(self._timed("embed", partial(group.embed, self._embedder)))
        for rows in batches(group.references, self._batch_size) if read else ():
            with self.clock.phase("model"):
                memories = self._adapter.encode(group.texts(rows, self._adapter))
            put = partial(group.put, rows, memories)
            threads.encode(self._timed("encode", put, (memories.keys, memories.values)))
            del put, memories  # the worker's now, or gone: the model needs the room
            passed(len(rows))
        if not read:
            passed(len(group.references))
        threads.embedded()  # in this thread, whose waiting an interrupt may end

    def _timed(self, phase: str, work: Job, tensors: "Sequence[Tensor]" = ()) -> Job:
        """A job that does the work once the device has computed ``tensors``."""
        ready = self._stream.mark()

        def job() -> None:
            with self.clock.phase(phase), self._stream.use():
                self._stream.arrive(ready, tensors)
                work()

        return job
