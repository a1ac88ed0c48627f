"""One device: how it is resolved, and who gets it."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from m3runtime import assembly
from m3runtime.config.schema import Config, TierConfig
from m3runtime.config.units import parse_size
from m3runtime.device.resolve import resolve
from m3runtime.device.threads import prepare
from m3runtime.errors import ConfigError
from m3runtime.retrieval.embedder import Embedder, Embeddings
from m3runtime.storage.defaults import default_tiers
from m3runtime.testing.blocks import SLOT_BYTES

CPU = torch.device("cpu")
GIB = 1024**3


def config(tiers: list[dict[str, Any]], **embedder: object) -> Config:
    return Config.model_validate(
        {
            "bank": "bank",
            "model": {"path": "model", "device": "cpu"},
            "embedder": {"kind": f"{__name__}:Placed", "path": "embedder", **embedder},
            "tiers": [*tiers, {"kind": "lmdb"}],
        }
    )


def test_auto_is_the_accelerator_if_there_is_one() -> None:
    found = resolve("auto")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    assert found.type == ("cpu" if accelerator is None else accelerator.type)
    assert (found.index is None) == (found.type == "cpu")


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_there_is_one_cpu(name: str) -> None:
    assert resolve(name) == CPU


@pytest.mark.parametrize("name", ["cuda:99", "xpu", "mps:7", "meta", "nonsense", ""])
def test_a_device_that_this_machine_does_not_have_is_one_clear_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(name)
    assert str(caught.value) == f"model.device: no device {name!r} on this machine"


def test_default_tiers_fit_the_machine() -> None:
    *caching, home = default_tiers(CPU)
    assert home == TierConfig(kind="lmdb")
    assert [tier.kind for tier in caching] == ["pinned"]
    assert 0 < parse_size(caching[0].options["capacity"]) <= 8 * GIB


@pytest.mark.gpu
def test_default_tiers_follow_the_device() -> None:
    assert [tier.kind for tier in default_tiers(resolve("cuda"))] == ["gpu", "pinned", "lmdb"]
    assert [tier.kind for tier in default_tiers(CPU)] == ["pinned", "lmdb"]
    opened = assembly.open_tiers(Config.model_validate({**config([]).model_dump(), "tiers": []}), SLOT_BYTES, CPU)
    assert [tier.device for tier in opened] == [CPU]
    for tier in opened:
        tier.close()


@pytest.mark.parametrize("named", [{}, {"device": "auto"}, {"device": "cpu"}])
def test_a_tier_gets_the_device_of_the_runtime(named: dict[str, str]) -> None:
    (tier,) = assembly.open_tiers(config([{"kind": "gpu", "capacity": "1MiB", **named}]), SLOT_BYTES, CPU)
    assert tier.device == CPU
    tier.close()


def test_a_tier_on_another_device_is_refused_in_one_line() -> None:
    """Whether this machine has it or not."""
    asked = config([{"kind": "pinned", "capacity": "1MiB"}, {"kind": "gpu", "capacity": "1MiB", "device": "cpu"}])
    with pytest.raises(ConfigError) as caught:
        assembly.open_tiers(asked, SLOT_BYTES, torch.device("meta"))
    assert str(caught.value) == (
        "tiers.1.device is cpu, but the runtime computes on meta; remove it, or set model.device"
    )
    asked = config([{"kind": "gpu", "capacity": "1MiB", "device": "cuda:99"}])
    with pytest.raises(ConfigError, match=r"^tiers.0.device: no device 'cuda:99' on this machine$"):
        assembly.open_tiers(asked, SLOT_BYTES, CPU)


class Placed(Embedder):
    """Says where it was put."""

    dim = 3
    fingerprint = "0" * 32
    places: ClassVar[list[str]] = []

    def __init__(self, path: str | Path, *, device: str = "cpu") -> None:
        self.places.append(device)

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        return np.zeros((len(texts), self.dim), np.float32)

    embed_queries = embed_references


def test_an_embedder_gets_the_device_of_the_runtime_unless_it_is_told_to_stay_on_the_cpu() -> None:
    meta = torch.device("meta")
    Placed.places.clear()
    for options in ({}, {"device": "auto"}, {"device": "cpu"}):
        assembly.open_embedder(config([], **options), meta)
    assembly.open_embedder(config([]))  # by itself it resolves model.device
    assert Placed.places == ["meta", "meta", "cpu", "cpu"]


@pytest.mark.gpu
def test_a_thread_computes_on_the_device_that_it_was_prepared_for() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    found: list[int] = []

    def work() -> None:
        prepare(device, 1)
        found.append(torch.cuda.current_device())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [device.index]
