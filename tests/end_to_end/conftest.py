"""A model, an embedder and a folder to run ``m3`` in."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers.utils import logging

import run as demo
from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import CodecConfig, Config
from tests.end_to_end.commands import Place
from tests.end_to_end.nursery import NURSERY, Nursery
from tests.forked import Program
from tests.model.families import make_model, make_tokenizer

NewPlace = Callable[[Path], Place]


POSITIONS = 4096
"""Positions of the tiny model."""


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, in a folder as the transformers library writes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    logging.disable_progress_bar()
    model = copy.deepcopy(make_model("llama"))
    model.config.max_position_embeddings = POSITIONS  # the evaluations have long prompts
    model.save_pretrained(folder)
    logging.enable_progress_bar()
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def new_place(model_path: Path) -> NewPlace:
    """Makes a folder in which commands can run; its bank is not there yet."""

    def make(folder: Path) -> Place:
        folder.mkdir(parents=True, exist_ok=True)
        place = Place(folder)
        place.configure(
            bank="./bank",
            model={"path": str(model_path)},
            codec={"kind": "scalar"},
            embedder={"kind": "tests.end_to_end.embedders:HashedWords", "path": "hashed"},
            tiers=[{"kind": "pinned", "capacity": "4MiB"}, {"kind": "lmdb"}],
            recall={"min_score": 0.1, "when_late": "wait"},
            generate={"max_new_tokens": 6},
        )
        return place

    return make


@pytest.fixture(scope="session")
def real_model(smollm2_path: Path, minilm_path: Path) -> Iterator[tuple[Adapter, Config]]:
    """The demo's model and settings, but with a codec that has nothing to train."""
    paths = {"model.path": smollm2_path, "embedder.path": minilm_path}
    config = Config.load(demo.SETTINGS, {}, {key: str(path) for key, path in paths.items()})
    config = config.model_copy(update={"codec": CodecConfig(kind="scalar")})
    adapter = assembly.open_adapter(config)
    yield adapter, config
    adapter.close()


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Program(NURSERY) as process:
        yield Nursery(process)


@pytest.fixture
def place(tmp_path: Path, new_place: NewPlace) -> Place:
    """An empty folder to run commands in."""
    return new_place(tmp_path / "place")


@pytest.fixture(scope="session")
def written_once(tmp_path_factory: pytest.TempPathFactory, new_place: NewPlace) -> Place:
    """A bank of `FACTS`. Only for looking at."""
    place = new_place(tmp_path_factory.mktemp("written"))
    result = place.m3("write", place.facts(), "--json")
    assert result.code == 0, result.err
    return place


@pytest.fixture
def written(written_once: Place, tmp_path: Path) -> Place:
    """A bank of `FACTS` that a test may change."""
    shutil.copytree(written_once.folder, tmp_path / "written")
    return Place(tmp_path / "written")
