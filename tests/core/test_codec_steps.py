"""Laws of the steps of a training: what was computed is kept, and interrupted trainings end as others do."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.steps import Steps
from m3runtime.errors import CodecError
from m3runtime.testing.codec_laws import SPEC, make_memories

SAMPLE = make_memories([12, 9, 12, 7] * 6, seed=1)


def never() -> Mapping[str, Tensor]:
    raise AssertionError("computed again")


def test_a_step_is_computed_once(tmp_path: Path) -> None:
    made = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.zeros(0, 4)}
    taken = Steps(tmp_path / "training", "key").take("one", lambda: made)
    again = Steps(tmp_path / "training", "key").take("one", never)
    for found in (taken, again):
        assert found.keys() == made.keys()
        assert all(torch.equal(found[name], made[name]) for name in made)


def test_another_key_begins_anew(tmp_path: Path) -> None:
    Steps(tmp_path / "training", "key").take("one", lambda: {"a": torch.ones(1)})
    found = Steps(tmp_path / "training", "other").take("one", lambda: {"a": torch.zeros(1)})
    assert found["a"].item() == 0


@pytest.mark.parametrize("work", [lambda data: data[:-1], lambda data: b"", lambda data: data[:20] + b"?" + data[21:]])
def test_a_damaged_step_is_computed_again(tmp_path: Path, work: "object") -> None:
    Steps(tmp_path, "").take("one", lambda: {"a": torch.ones(3)})
    path = tmp_path / "one"
    path.write_bytes(work(path.read_bytes()))  # type: ignore[operator]
    assert Steps(tmp_path, "").take("one", lambda: {"a": torch.zeros(3)})["a"].sum() == 0


def test_nothing_is_kept_without_a_folder() -> None:
    steps = Steps()
    steps.take("one", lambda: {"a": torch.ones(1)})
    with pytest.raises(AssertionError, match="computed again"):
        steps.take("one", never)
    steps.remove()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CodecError, match=f"{tmp_path}/file/training"):
        Steps(tmp_path / "file" / "training", "key")


class Interrupted(Steps):
    """Ends the training at the step ``after`` so many, and counts what is computed."""

    after = 0
    computed = 0

    def take(self, name: str, work: "object") -> Mapping[str, Tensor]:
        def counted() -> Mapping[str, Tensor]:
            if self.computed == self.after:
                raise KeyboardInterrupt
            self.computed += 1
            return work()  # type: ignore[no-any-return, operator]

        return super().take(name, counted)


@pytest.mark.parametrize("options", [{}, {"together": "head"}, {"key_bytes": 4, "value_bytes": 4}])
def test_an_interrupted_training_goes_on_and_gives_the_same_codec(tmp_path: Path, options: dict[str, object]) -> None:
    pytest.importorskip("faiss")
    whole = ProductCodec(SPEC, **options)  # type: ignore[arg-type]
    whole.fit(SAMPLE)
    computed, codec = 0, ProductCodec(SPEC, **options)  # type: ignore[arg-type]
    while not codec.trained:
        steps = Interrupted(tmp_path, "key")
        steps.after = 2
        try:
            codec.fit(SAMPLE, steps=steps)
        except KeyboardInterrupt:
            assert not codec.trained
        computed += steps.computed
        assert computed < 100
    assert computed > 3
    assert codec.fingerprint == whole.fingerprint
    before = Interrupted(tmp_path, "key")
    codec.fit(SAMPLE, steps=before)
    assert before.computed == 0
