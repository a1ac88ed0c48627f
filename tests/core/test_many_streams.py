"""Streams of many threads: what arrives together is served together, with the results of each alone."""

import linecache
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from types import FrameType

import pytest
import torch

from m3runtime.errors import InputError, M3Error
from m3runtime.recall.batching import Batched
from m3runtime.recall.recalled import Recalled
from m3runtime.retrieval.recent import Recent
from m3runtime.testing.threads import together
from tests.core.recalling import (
    BAD,
    PART_BYTES,
    TEXTS,
    WORDS,
    GatedHome,
    decoded_by,
    embedder_of,
    open_runtime,
    pinned,
    shut,
)


def texts_of(stream: int, chunks: int) -> list[str]:
    random = Random(stream)
    return [" ".join(random.choices(WORDS, k=2)) for _ in range(chunks)]


@pytest.mark.parametrize("decoded", [15 * PART_BYTES, 100 * PART_BYTES])
def test_threads_recall_what_they_would_one_after_the_other(decoded: int, tmp_path: Path) -> None:
    streams, chunks = 5, 12
    recalled: list[list[Recalled]] = [[] for _ in range(streams)]
    with open_runtime(tmp_path / "bank", tiers=pinned(4), decoded=decoded) as runtime:

        def work(number: int) -> None:
            random = Random(-number)
            with runtime.stream() as stream:
                for text in texts_of(number, chunks):
                    if random.random() < 0.7:
                        stream.hint(text if random.random() < 0.7 else random.choice(WORDS))
                    recalled[number].append(stream.recall(text))
                    assert runtime.metrics().store.bytes <= decoded

        together(streams, work)
        assert runtime.background.drain(timeout=60)
        counts = runtime.metrics()
        assert (counts.store.leased, counts.store.guessed) == (0, 0)
        assert counts.lookahead.failed == 0
        assert counts.recall.chunks == streams * chunks
        runtime.store.check_integrity()
        for number in range(streams):
            with runtime.stream() as stream:
                for text, before in zip(texts_of(number, chunks), recalled[number], strict=True):
                    now = stream.recall(text)
                    assert (now.ids, now.scores, now.log_weights) == (before.ids, before.scores, before.log_weights)
                    for mine, theirs in zip(now.parts, before.parts, strict=True):
                        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


def test_recalls_that_come_while_another_is_embedded_are_embedded_together(tmp_path: Path) -> None:
    with open_runtime(tmp_path / "bank", wrap=GatedHome, memories=1) as runtime:
        embedder = embedder_of(runtime)
        recalled: dict[int, Recalled] = {}
        streams = [runtime.stream() for _ in range(5)]

        def recall(number: int) -> None:
            recalled[number] = streams[number].recall(TEXTS[number])

        threads = [threading.Thread(target=recall, args=(number,)) for number in range(5)]
        with shut(embedder.gate):
            threads[0].start()
            embedder.entered.acquire()
            for thread in threads[1:]:
                thread.start()
            while len(runtime._recall._search._waiting) < 4:
                pass
        for thread in threads:
            thread.join()
        assert [len(call) for call in embedder.calls] == [1, 4]
        assert {number: one.ids for number, one in recalled.items()} == {number: (number,) for number in range(5)}
        assert decoded_by(runtime) == [1] * 5
        assert runtime.metrics().recall_phases["recall"].count == 5


def test_a_text_that_cannot_be_embedded_fails_nobody_else(tmp_path: Path) -> None:
    with open_runtime(tmp_path / "bank", memories=1) as runtime:
        embedder = embedder_of(runtime)
        outcomes: dict[str, object] = {}

        def recall(text: str) -> None:
            try:
                outcomes[text] = runtime.stream().recall(text).ids
            except InputError as error:
                outcomes[text] = str(error)

        texts = [TEXTS[0], BAD, TEXTS[1], TEXTS[2]]
        threads = [threading.Thread(target=recall, args=(text,)) for text in texts]
        with shut(embedder.gate):
            threads[0].start()
            embedder.entered.acquire()
            for thread in threads[1:]:
                thread.start()
            while len(runtime._recall._search._waiting) < 3:
                pass
        for thread in threads:
            thread.join()
        assert outcomes == {TEXTS[0]: (0,), BAD: "this text cannot be embedded", TEXTS[1]: (1,), TEXTS[2]: (2,)}


def test_streams_of_other_kinds_do_not_mix(tmp_path: Path) -> None:
    with open_runtime(tmp_path / "bank", memories=1) as runtime:
        with runtime.stream() as one, runtime.stream(torch.float16) as other:
            with pytest.raises(InputError, match="the same dtype"):
                runtime.recall([one, other], ["lamp", "lamp"])
            with pytest.raises(InputError, match="1 streams, but 2 texts"):
                runtime.hint([one], ["lamp", "lamp"])
        assert runtime.recall([], []) == []
        dtypes = [torch.float32, torch.float16, torch.float32, torch.float16]

        def work(number: int) -> None:
            with runtime.stream(dtypes[number]) as stream:
                for text in TEXTS[:8]:
                    waits = number < 2
                    parts = stream.recall(text, wait=waits).parts
                    assert len(parts) in ((1,) if waits else (0, 1))
                    assert all(part[0].dtype == dtypes[number] for part in parts)

        together(4, work)


@pytest.mark.parametrize("seed", range(4))
def test_closing_in_the_midst_of_it_ends_everything_in_order(seed: int, tmp_path: Path) -> None:
    """Every call ends, in a result or a typed error, and no thread is left."""
    runtime = open_runtime(tmp_path / "bank", tiers=pinned(2), when_late=("wait", "skip")[seed % 2])
    begun = threading.Semaphore(0)

    def work(number: int) -> None:
        if number == 0:
            for _ in range(8 + seed):
                begun.acquire()
            runtime.close()
            return
        stream = runtime.stream()
        for text in texts_of(number, 50):
            begun.release()
            try:
                stream.hint(text)
                stream.recall(text)
            except M3Error:
                break
        stream.close()

    together(4, work)
    runtime.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("m3-")]
    stored = runtime.metrics().store
    assert (stored.leased, stored.guessed) == (0, 0)


# -- what they are made of --------------------------------------------------------------------------------------------


class Doubling:
    """Doubles numbers, notes the batches, and fails for 13."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.batched = Batched(self.serve)

    def serve(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        self.entered.release()
        self.gate.wait()
        if 13 in numbers:
            raise ZeroDivisionError
        return [2 * number for number in numbers]


def test_requests_that_come_meanwhile_are_one_batch_and_each_has_its_own_error() -> None:
    doubling = Doubling()
    results: dict[int, int] = {}

    def ask(number: int) -> None:
        try:
            results[number] = doubling.batched(number)
        except ZeroDivisionError:
            results[number] = -1

    threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1, 13, 6)]
    threads[0].start()
    doubling.entered.acquire()
    for thread in threads[1:]:
        thread.start()
    while len(doubling.batched._waiting) < 3:
        pass
    doubling.gate.set()
    for thread in threads:
        thread.join()
    assert results == {0: 0, 1: 2, 6: 12, 13: -1}
    assert sorted(map(sorted, doubling.batches)) == [[0], [1], [1, 6, 13], [6], [13]]


def test_many_threads_of_requests_all_get_their_own_result() -> None:
    doubling = Doubling()
    doubling.gate.set()
    results: list[list[int]] = [[] for _ in range(6)]

    def ask(thread: int) -> None:
        for number in range(0, 40, 4):
            results[thread].append(doubling.batched(100 * thread + number))

    together(6, ask)
    assert results == [[2 * (100 * thread + number) for number in range(0, 40, 4)] for thread in range(6)]


@pytest.mark.parametrize("line", range(1, 25))
def test_an_interrupt_at_any_line_leaves_no_later_request_waiting(line: int) -> None:
    batched = Batched[int, int](lambda numbers: [2 * number for number in numbers])
    done = list[int]()

    def interrupt(frame: FrameType, event: str, _: object) -> object:
        # A signal is handled between calls: never between the end of a `with` block and the release of its lock.
        here = frame.f_code.co_filename.endswith("batching.py") and event == "line"
        if here and not linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip().startswith("with"):
            done.append(frame.f_lineno)
            if len(done) == line:
                raise KeyboardInterrupt
        return interrupt

    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        assert batched(1) == 2
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(batched, [3, 4], timeout=60)) == [6, 8]


def test_recent_results_are_kept_and_computed_once() -> None:
    recent, computed = Recent[int, int](2), list[int]()

    def compute(number: int) -> int:
        computed.append(number)
        if number < 0:
            raise ValueError(number)
        return number * number

    assert [recent(n, lambda n=n: compute(n)) for n in (1, 2, 1, 3, 1, 2)] == [1, 4, 1, 9, 1, 4]  # type: ignore[misc]
    assert computed == [1, 2, 3, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="-1"):
            recent(-1, lambda: compute(-1))
    computed.clear()
    together(6, lambda _: computed.append(recent(7, lambda: compute(7))))
    assert sorted(computed) == [7] + [49] * 6
