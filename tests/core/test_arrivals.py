"""What a recall leaves behind when it is cut short, and what it delivers wherever it was decoded."""

from pathlib import Path

import numpy as np
import pytest
import torch

from m3runtime.errors import TierClosedError, TierError
from tests.core.recalling import TEXTS, decoded_by, open_runtime


def test_a_recall_that_fails_before_it_reads_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_runtime(tmp_path / "bank", when_late="skip", deadline=60.0) as runtime, runtime.stream() as stream:

        def near(_: object) -> None:
            raise TierError("tier pinned: gone for a moment")

        with monkeypatch.context() as patch:
            patch.setattr(runtime.hierarchy, "near", near)
            with pytest.raises(TierError, match="gone for a moment"):
                stream.recall(TEXTS[3])
        assert len(stream.recall(TEXTS[3])) == 3


def test_a_recall_that_finds_the_prefetcher_closed_keeps_nobody_waiting(tmp_path: Path) -> None:
    with open_runtime(tmp_path / "bank", when_late="skip", deadline=60.0) as runtime, runtime.stream() as stream:
        near = stream.recall(TEXTS[3], wait=True).ids
        stream.recall(TEXTS[20], wait=True)
        runtime._prefetcher.close()
        with pytest.raises(TierClosedError):
            stream.recall(f"{TEXTS[3]} {TEXTS[10]}")
        assert not runtime._lookahead.arrivals._there
        assert stream.recall(TEXTS[3]).ids == near  # from the fastest tier, in its own thread
        assert len(stream.recall(TEXTS[10], wait=True)) == 3


def test_memories_that_are_decoded_in_one_call_are_apart_all_the_same(tmp_path: Path) -> None:
    """As on a GPU."""
    with (
        open_runtime(tmp_path / "bank") as runtime,
        open_runtime(tmp_path / "other") as plain,
        runtime.stream() as stream,
        plain.stream() as other,
    ):
        runtime._fetcher.at_once = 64
        one, two = stream.recall(TEXTS[3]), other.recall(TEXTS[3])
        assert decoded_by(runtime) == [3]
        assert decoded_by(plain) == [1, 1, 1]
        for mine, theirs in zip(one.parts, two.parts, strict=True):
            for x, y in zip(mine, theirs, strict=True):
                assert torch.equal(x, y)
                assert x.untyped_storage().nbytes() == x.nbytes


def test_a_prompt_asks_the_home_what_another_process_forgot(tmp_path: Path) -> None:
    with open_runtime(tmp_path / "bank") as runtime, runtime.stream() as stream:
        first = stream.recall(TEXTS[3])
        runtime.bank.home.discard(np.array(first.ids[:1], np.uint64))  # behind the runtime's back
        assert stream.recall(TEXTS[3], wait=True).ids == first.ids[1:]
