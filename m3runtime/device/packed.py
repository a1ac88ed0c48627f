"""`PackedWeight`: a weight in the layout in which a CPU multiplies it fastest."""

from typing import Any, Self

import torch
from torch import Tensor

_ROWS = 64
"""Rows that the layout is chosen for. It was the fastest one for 1 to 512 rows, in float32 and in bfloat16."""
_DTYPES = (torch.float32, torch.bfloat16)


class PackedWeight:
    """The weight of a linear layer, ``[out, in]``, in blocks that oneDNN multiplies without copying them first.

    `torch.nn.functional.linear` packs the weight anew in each call, which takes longer than the product itself where
    there are few rows. A packed weight takes as much memory as the plain one. With AVX2 or AVX-512 a row's product has
    the same bits whatever rows stand beside it, and on any number of threads. Torch's compiler packs by the same two
    operators. They have no gradients. Thread-safe.
    """

    def __init__(self, packed: Tensor) -> None:
        self._packed = packed

    @classmethod
    def of(cls, weight: Tensor) -> Self | None:
        """A packed copy, or None where this weight, this CPU or this build of torch does not allow it."""
        is_plain = weight.device.type == "cpu" and weight.layout is torch.strided and weight.numel() > 0
        if not is_plain or weight.dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
            return None
        try:
            with torch.no_grad():
                packed = cls(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS))
                packed.product(weight.new_zeros(1, weight.shape[1]), None)
        except (AttributeError, NotImplementedError, RuntimeError):  # an operator or an instruction is missing
            return None
        return packed

    def product(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """``rows @ weight.T + bias``: rows ``[..., in]`` of the weight's dtype, ``[..., out]``."""
        product: Any = torch.ops.mkldnn._linear_pointwise
        return product(rows, self._packed, bias, "none", [], "")  # type: ignore[no-any-return]
