"""An implementation is held against the law that catches it; one whose law is not known, until a first law fails."""

import multiprocessing
from collections.abc import Iterator

import pytest

from tests.testing.broken.laws import CAUGHT_BY

FAILED = pytest.StashKey[set[str]]()


def owner(item: pytest.Item) -> str:
    return item.nodeid.rpartition("::")[0]


def law_of(item: pytest.Item) -> str | None:
    """The law that catches the item's implementation, if it is known."""
    name = owner(item).rpartition("::")[2].removeprefix("Test")
    return CAUGHT_BY.get(item.path.stem, {}).get(name)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAILED] = set()


def pytest_runtestloop() -> None:
    """Let the other processes of homes be forked from one that has imported nothing else."""
    multiprocessing.set_forkserver_preload(["m3runtime.testing.home", "m3backends.lmdb.home"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where no law is named, those that take another process come last: most mistakes show without."""
    needless = [item for item in items if law_of(item) not in (None, getattr(item, "originalname", None))]
    config.hook.pytest_deselected(items=needless)
    classes = list(dict.fromkeys(map(owner, items)))
    tried = set(items).difference(needless)
    items[:] = sorted(
        (item for item in items if item in tried),
        key=lambda item: (classes.index(owner(item)), "other" in getattr(item, "fixturenames", ())),
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if owner(item) in item.config.stash[FAILED]:
        pytest.skip("caught already")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed and report.when == "call":
        item.config.stash[FAILED].add(owner(item))
    return report
