"""The nursery that cases run in: one for each worker, which imports torch once."""

from collections.abc import Iterator

import pytest

from tests.hostile.nursery import Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("hostile")) as nursery:
        yield nursery
