"""`PackedWeight`: the product of a linear layer, to the bit the same beside whatever rows and on any threads."""

import pytest
import torch
from torch.nn.functional import linear

from m3runtime.device.packed import PackedWeight
from m3runtime.device.threads import compute_on
from tests.core.test_threads import in_thread

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 0.02}
"""And how far a product may be from that of doubles, in parts of its largest number."""


def packed(weight: torch.Tensor) -> PackedWeight:
    found = PackedWeight.of(weight)
    if found is None:
        pytest.skip(f"this CPU packs no {weight.dtype}")
    return found


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (192, 576), (576, 1536)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_the_product_of_a_linear_layer(shape: tuple[int, int], dtype: torch.dtype, has_bias: bool) -> None:
    weight, bias = drawn(*shape, dtype=dtype), drawn(shape[0], dtype=dtype) if has_bias else None
    for rows in (drawn(1, shape[1], dtype=dtype), drawn(2, 9, shape[1], dtype=dtype), drawn(0, shape[1], dtype=dtype)):
        wanted = linear(rows.double(), weight.double(), None if bias is None else bias.double())
        found = packed(weight).product(rows, bias)
        assert (found.shape, found.dtype) == (wanted.shape, dtype)
        if rows.numel():
            assert (found.double() - wanted).abs().max() <= DTYPES[dtype] * max(1.0, wanted.abs().max().item())


def test_it_reads_rows_that_are_not_contiguous() -> None:
    weight, rows = drawn(5, 6), drawn(6, 4).t()
    assert torch.equal(packed(weight).product(rows, None), packed(weight).product(rows.contiguous(), None))


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="not without AVX2")
def test_a_rows_product_has_the_same_bits_beside_other_rows_and_on_other_threads() -> None:
    weight, rows = packed(drawn(192, 576)), drawn(130, 576)
    whole = weight.product(rows, None)
    for count in (1, 2, 3, 7, 8, 33, 64, 130):
        assert torch.equal(weight.product(rows[:count], None), whole[:count])

    def on(threads: int) -> torch.Tensor:
        compute_on(threads)
        return weight.product(rows, None)

    for threads in (1, 2, 3):
        assert torch.equal(in_thread(lambda threads=threads: on(threads)), whole)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(2, 2, dtype=torch.float64),
        torch.zeros(0, 2),
        torch.zeros(2, 2, device="meta"),
        torch.eye(2).to_sparse(),
    ],
    ids=["float64", "empty", "elsewhere", "sparse"],
)
def test_other_weights_are_not_packed(weight: torch.Tensor) -> None:
    assert PackedWeight.of(weight) is None
