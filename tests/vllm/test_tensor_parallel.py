"""Tensor parallel: three workers, each with one of three KV heads, that read the bank themselves."""

from typing import Any

import pytest

from tests.vllm.both import Both, check_refreshed

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    return {"tensor_parallel_size": 3, "slots": 253, "distributed_executor_backend": "mp"}


def test_three_workers(both: Both) -> None:
    check_refreshed(both)
