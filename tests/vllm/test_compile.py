"""Under torch.compile: the same answers."""

from typing import Any

import pytest

from tests.vllm.both import Both, check_refreshed

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    return {"enforce_eager": False, "slots": 253}


def test_compiled_as_eager(both: Both) -> None:
    check_refreshed(both)
