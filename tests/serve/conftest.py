"""A server that many tests share."""

from collections.abc import Iterator

import pytest

from tests.serve.serving import Serving, tiny


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server without keys, over the tiny model."""
    with tiny(tmp_path_factory.mktemp("serve")) as one:
        yield one
