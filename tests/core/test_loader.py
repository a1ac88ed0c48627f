"""Decoding in bounded bytes, and the events that order CUDA streams, seen without a GPU."""

import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3runtime.device.side_stream import SideStream
from m3runtime.recall import loader
from m3runtime.recall.loader import DECODE_BYTES, batch_size
from m3runtime.recall.recalled import Recalled
from m3runtime.testing.threads import together
from tests.core.recalling import TEXTS, decoded_by, open_runtime


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        (2 * 32 * 8 * 128 * 128 * 4, 8),  # a reference of 128 tokens in a model of 8 billion parameters
        (3 * DECODE_BYTES, 1),
        (DECODE_BYTES, 1),
        (1024, DECODE_BYTES // 1024),
    ],
)
def test_an_accelerator_decodes_at_most_so_many_bytes_in_one_call(part: int, rows: int) -> None:
    assert batch_size(torch.device("cuda", 0), part) == rows
    assert batch_size(torch.device("cpu"), part) == 1


def test_what_many_streams_want_is_decoded_in_bounded_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recalled(name: str) -> tuple[list[Recalled], list[int]]:
        with open_runtime(tmp_path / name, memories=1) as runtime:
            streams = [runtime.stream() for _ in range(7)]
            return runtime.recall(streams, TEXTS[:7]), decoded_by(runtime)

    one_by_one, calls = recalled("one")
    assert calls == [1] * 7
    monkeypatch.setattr(loader, "batch_size", lambda *_: 3)  # as on an accelerator
    batched, calls = recalled("three")
    assert calls == [3, 3, 1]
    for mine, theirs in zip(one_by_one, batched, strict=True):
        assert mine.ids == theirs.ids
        for part, other in zip(mine.parts, theirs.parts, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(part, other, strict=True))
            assert all(x.untyped_storage().nbytes() == x.nbytes for x in other)


class Recording(SideStream):
    """Notes who marks an event, who waits for it, and for which tensors."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.marked: dict[torch.Event, int] = {}
        self.arrived: list[tuple[int, torch.Event, frozenset[int]]] = []

    def mark(self) -> torch.Event:
        event = torch.Event("cpu")
        self.marked[event] = threading.get_ident()
        return event

    def arrive(self, event: torch.Event | None, tensors: Iterable[Tensor]) -> None:
        assert event is not None
        self.arrived.append((threading.get_ident(), event, frozenset(map(id, tensors))))


@pytest.mark.parametrize("hinted", [False, True])
def test_every_thread_waits_for_the_event_of_each_part_that_it_reads(hinted: bool, tmp_path: Path) -> None:
    """Whoever loaded it: this thread, another one's recall, or a hint; for this chunk or an earlier one."""
    with open_runtime(tmp_path / "bank") as runtime:
        side = runtime._loader.side = Recording()
        threads: dict[int, list[Recalled]] = {}
        if hinted:
            with runtime.stream() as stream:
                stream.hint("lamp oil harbour")
                assert runtime.background.drain(timeout=60)

        def recall(_: int) -> None:
            with runtime.stream() as stream:
                threads[threading.get_ident()] = [stream.recall("lamp oil harbour") for _ in range(2)]

        together(4, recall)
        assert len(threads) == 4
        for thread, recalls in threads.items():
            for part in (part for recalled in recalls for part in recalled.parts):
                tensors = frozenset(map(id, part))
                events = [event for who, event, waited in side.arrived if who == thread and waited == tensors]
                assert len(events) == 2, "once for each recall"
                assert events[0] in side.marked
        assert hinted == set(side.marked.values()).isdisjoint(threads)
