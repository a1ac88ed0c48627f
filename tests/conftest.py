"""Hypothesis profiles and the real models that tests share."""

import gc
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch and the tokenizers are imported: no test asks a model hub, and the workers of pytest-xdist
# share the cores instead of each starting a thread on every one. (They inherit what this line sets for the process
# that starts them.)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
root = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(str(root / name) for name in (".", "backends", "model"))  # as pyproject.toml
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
share = max(1, (os.cpu_count() or 1) // workers)
os.environ["OMP_NUM_THREADS"] = str(min(share, int(os.environ.get("OMP_NUM_THREADS", share))))

import faiss  # noqa: E402, F401 - before usearch: afterwards `faiss.index_factory`, which tests compare with, crashes

import models  # noqa: E402

# No deadlines: the first example of a property often pays for an import or a warm-up.
settings.register_profile("dev", deadline=None, max_examples=20)
settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True, print_blob=True)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

CACHE = Path(__file__).parent.parent / ".cache" / "models"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch  # only here: most runs of a few tests never need it

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays: a search for garbage need not look through it, which takes half a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        multiprocessing.set_forkserver_preload(["tests.preloaded"])  # what the modules of the tests set before is less


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Likewise what is left when a file's tests have ended: tests that search for garbage look at their own alone."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return result


def pytest_unconfigure() -> None:
    """Let the interpreter find at its end what it froze, or extension modules complain of what they never get back."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The folder of SmolLM2-135M-Instruct in float32."""
    try:
        return models.smollm2(CACHE)
    except models.ModelMissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    try:
        return models.minilm()
    except models.ModelMissingError as error:
        pytest.skip(str(error))
