"""The file of a bank's bias directions: read as it was written, by its own model, or refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from m3runtime.bank.bias import BIAS, BiasDirections, BiasFacts
from m3runtime.bank.manifest import Manifest
from m3runtime.errors import BankError, BankMismatchError
from m3runtime.memory.spec import MemorySpec

SPEC = MemorySpec(layers=(1, 3), kv_heads=2, tokens=8, head_dim=4, reference_tokens=8, dtype="float32")
MANIFEST = Manifest(
    model="a1" * 16,
    model_name="tiny",
    tokenizer="0d" * 16,
    sink="<s>",
    spec=SPEC,
    codec_kind="raw",
    codec_options={},
    codec="0" * 32,
    embedder="0" * 32,
    embedder_name="none",
    dim=4,
)
FACTS = BiasFacts(
    model=MANIFEST.model,
    model_name="tiny",
    layers=SPEC.layers,
    sink_ids=(5, 7, 9),
    dtype="float32",
    offset=11,
    length=64,
    null_level=40.0,
    null_weight=1e-9,
    weights=True,
    weight_error=0.05,
)


def made(**changes: Any) -> BiasDirections:
    torch.manual_seed(0)
    figures = [torch.rand(4, 2) for _ in range(4)]
    return BiasDirections(replace(FACTS, **changes), torch.randn(4, 2, 4), *figures, *torch.randn(2, 4, 2, 3, 4))


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = made()
    assert written.save(tmp_path) == tmp_path / BIAS
    read = BiasDirections.load(tmp_path, MANIFEST)
    assert read is not None
    assert read.facts == FACTS
    for name in ("directions", "mean", "std", "least", "greatest", "sink_keys", "sink_values"):
        torch.testing.assert_close(getattr(read, name), getattr(written, name), rtol=0, atol=0)


def test_a_bank_without_the_file_has_no_directions(tmp_path: Path) -> None:
    assert BiasDirections.load(tmp_path, MANIFEST) is None


def test_keys_are_raised_along_the_direction_and_null_keys_are_far_against_it() -> None:
    bias, keys = made(), torch.randn(2, 2, 5, 4)
    query = bias.directions / bias.directions.square().sum(-1, keepdim=True)  # meets the direction with exactly one
    of_memory = query[list(SPEC.layers)]
    before, after = (torch.einsum("lhd,lhtd->lht", of_memory, k) for k in (keys, bias.raised(keys, -3.0)))
    torch.testing.assert_close(after, before - 3.0)
    torch.testing.assert_close((query * bias.null_keys).sum(-1), torch.full((4, 2), -40.0))


@pytest.mark.parametrize(
    ("facts", "manifest", "said"),
    [
        ({"model": "b2" * 16, "model_name": "other"}, MANIFEST, "of another model .other, b2b2b2b2., not tiny"),
        ({"layers": (1, 2)}, MANIFEST, "of other memory layers or heads"),
        ({}, replace(MANIFEST, spec=replace(SPEC, head_dim=8)), "of other memory layers"),
    ],
)
def test_another_models_file_is_refused(tmp_path: Path, facts: Any, manifest: Manifest, said: str) -> None:
    made(**facts).save(tmp_path)
    with pytest.raises(BankMismatchError, match=rf"{BIAS}: {said}.*m3 calibrate-bias"):
        BiasDirections.load(tmp_path, manifest)


def test_every_byte_of_the_file_counts(tmp_path: Path) -> None:
    path = made().save(tmp_path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    padding = len(whole[8:start]) - len(whole[8:start].rstrip())
    for at in [*range(start - padding), *range(start, len(whole), 7)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BankError, match=f"{BIAS}: "):
            BiasDirections.load(tmp_path, MANIFEST)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, b"{}"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / BIAS).write_bytes(content)
    with pytest.raises(BankError, match=f"{BIAS}: damaged, or not a file of bias directions"):
        BiasDirections.load(tmp_path, MANIFEST)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = made().save(tmp_path)
    data = path.read_bytes()
    head = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["m3runtime"])
    safetensors.torch.save_file(safetensors.torch.load(data), path, {"m3runtime": json.dumps({**head, "format": 2})})
    with pytest.raises(BankError, match="format 2, this release reads 1"):
        BiasDirections.load(tmp_path, MANIFEST)


def test_a_folder_in_the_files_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / BIAS).mkdir()
    with pytest.raises(BankError, match=f"{BIAS}: cannot be read"):
        BiasDirections.load(tmp_path, MANIFEST)
