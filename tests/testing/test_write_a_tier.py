"""The example of docs/write-a-tier.md, run as it is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m3backends.lmdb.home import LmdbHome
from m3runtime.assembly import open_tiers
from m3runtime.config.schema import Config
from m3runtime.errors import ConfigError
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.testing.blocks import SLOT_BYTES, STAMP, make_batch, make_blocks, make_ids, same_block
from tests.testing import guide

CPU = torch.device("cpu")
FEWER_EXAMPLES = """
from hypothesis import settings

settings.register_profile("fewer", max_examples=8, stateful_step_count=15, deadline=None)
settings.load_profile("fewer")
"""
"""Fewer than the machines of tests/core/test_hierarchy.py get: what is tested here is the example."""


@pytest.fixture
def example(tmp_path: Path) -> Path:
    guide.write(tmp_path)
    return tmp_path


@pytest.fixture
def importable(example: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(example)
    monkeypatch.chdir(example)
    monkeypatch.delitem(sys.modules, "folder_tier", raising=False)
    return example


def test_the_document_has_a_tier_its_test_and_a_configuration() -> None:
    files = guide.files()
    assert list(files) == ["folder_tier.py", "test_folder_tier.py", "m3.yaml"]
    assert max(len(line) for text in files.values() for line in text.splitlines()) <= 120
    assert len(files["test_folder_tier.py"].splitlines()) <= 40


def test_the_tier_passes_the_suite_and_the_machine(example: Path) -> None:
    (example / "conftest.py").write_text(FEWER_EXAMPLES)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "test_folder_tier.py"],
        cwd=example,
        env={**environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-5000:]
    passed = int(ended.stdout.rpartition(" passed")[0].rpartition("\n")[2].split()[-1])
    assert passed >= 40


def test_the_configuration_plugs_it_in(importable: Path) -> None:
    config = Config.load(importable / "m3.yaml", environ={}, overrides={})
    config = config.model_copy(update={"tiers": config.tiers[1:]})  # page-locked memory may be short
    ids = make_ids(*range(5))
    with LmdbHome(path="home", slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch(ids.tolist()))
        for hits in (0, 5):  # the second time it finds what the first left
            [tier] = open_tiers(config, SLOT_BYTES, CPU)
            assert type(tier).__name__ == "FolderTier"
            assert tier.capacity == 64 << 30
            hierarchy = Hierarchy([tier], home, STAMP)
            out = torch.zeros((5, SLOT_BYTES), dtype=torch.uint8)
            assert hierarchy.read(ids, out).all()
            assert all(map(same_block, out, make_blocks(ids)))
            assert hierarchy.stats()[0].hits == hits
            hierarchy.close()


def test_an_option_that_it_does_not_have_is_one_clear_line(importable: Path) -> None:
    text = (importable / "m3.yaml").read_text().replace("path: ./cache", "paht: ./cache")
    (importable / "m3.yaml").write_text(text)
    config = Config.load(importable / "m3.yaml", environ={}, overrides={})
    with pytest.raises(ConfigError, match=r"tiers.1.paht is not known; did you mean tiers.1.path\?"):
        open_tiers(config, SLOT_BYTES, CPU)
