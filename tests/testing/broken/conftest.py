"""One failure condemns an implementation: its other laws are not tried."""

from collections.abc import Iterator

import pytest

FAILED = pytest.StashKey[set[str]]()


def owner(item: pytest.Item) -> str:
    return item.nodeid.rpartition("::")[0]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAILED] = set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Laws that take another process come last: most mistakes show without."""
    classes = list(dict.fromkeys(map(owner, items)))
    items.sort(key=lambda item: (classes.index(owner(item)), "other" in getattr(item, "fixturenames", ())))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if owner(item) in item.config.stash[FAILED]:
        pytest.skip("caught already")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed and report.when == "call":
        item.config.stash[FAILED].add(owner(item))
    return report
