"""Directions that all queries of a KV head meet with nearly the same logit: least squares over their moments.

Queries are grouped, ``[kv_heads, n, head_dim]``: those of all heads that share a KV head, after RoPE, multiplied with
the scale of the model's logits. So a logit is a plain dot product.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from m3runtime.errors import InputError

_RIDGE = 1e-3
"""Of the mean square of a query's channel: keeps the direction short where queries hardly vary."""

SIZES = torch.arange(-200, 201) / 100
"""Logits that are told apart; the first stands for all below, the last for all above."""


class Moments:
    """``E[q]`` and ``E[q q^T]`` of one layer's queries, summed up in float64. No query is kept."""

    def __init__(self) -> None:
        self.count = 0
        self._first: Tensor | float = 0.0
        self._second: Tensor | float = 0.0

    def add(self, queries: Tensor) -> None:
        """Count in grouped queries, ``[kv_heads, n, head_dim]``."""
        self.count += queries.shape[1]
        queries = queries.float()
        self._first = self._first + queries.sum(1, dtype=torch.float64)
        self._second = self._second + (queries.transpose(1, 2) @ queries).double()

    def direction(self) -> Tensor:
        """The direction of each KV head, ``float32[kv_heads, head_dim]`` on the CPU.

        It minimises ``E[(q @ d - 1)^2]`` but for a little ridge, and ``E[q @ d]`` is one. Raises `InputError` without
        queries, and if those of a head have nothing in common.
        """
        if not isinstance(self._first, Tensor) or not isinstance(self._second, Tensor):
            raise InputError("there are no queries to fit bias directions to")
        mean, second = self._first.cpu() / self.count, self._second.cpu() / self.count
        size = mean.shape[1]
        ridge = _RIDGE * second.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        found = torch.linalg.solve(second + ridge[:, None, None] * torch.eye(size, dtype=torch.float64), mean)
        scale = (mean * found).sum(1, keepdim=True)
        if not (scale > 0).all():
            raise InputError("the queries of a head have nothing in common: there is no bias direction")
        direction: Tensor = (found / scale).float()
        return direction


@dataclass(frozen=True, slots=True)
class Spread:
    """The logits of a key of one direction, over queries: tensors of one shape, one at best."""

    count: Tensor
    mean: Tensor
    std: Tensor
    least: Tensor
    greatest: Tensor

    @classmethod
    def stacked(cls, spreads: Sequence["Spread"]) -> "Spread":
        """Several as one, along a new first dimension."""
        return cls(*(torch.stack([getattr(one, each.name) for one in spreads]) for each in fields(cls)))

    @property
    def error(self) -> Tensor:
        """The root mean square of the logit less one."""
        return ((self.mean - 1).square() + self.std.square()).sqrt()


class Logits:
    """Sums up the logits of directions, by KV head and by bucket of positions, and counts them by size."""

    def __init__(self, direction: Tensor, buckets: int) -> None:
        """``direction`` is ``[kv_heads, head_dim]``."""
        shape = (direction.shape[0], buckets)
        self._direction = direction
        self._count = torch.zeros(buckets, dtype=torch.float64)
        self._sum, self._squares = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self._least, self._greatest = torch.full(shape, torch.inf), torch.full(shape, -torch.inf)
        self._sizes = torch.zeros(shape[0], len(SIZES), dtype=torch.float64)

    def add(self, queries: Tensor, bucket: int) -> None:
        """Count in grouped queries, ``[kv_heads, n, head_dim]``, of one bucket."""
        direction = self._direction.to(queries.device)
        logits = (queries.float() @ direction[:, :, None])[..., 0].cpu()
        self._count[bucket] += logits.shape[1]
        self._sum[:, bucket] += logits.sum(1, dtype=torch.float64)
        self._squares[:, bucket] += logits.double().square().sum(1)
        self._least[:, bucket] = torch.minimum(self._least[:, bucket], logits.amin(1))
        self._greatest[:, bucket] = torch.maximum(self._greatest[:, bucket], logits.amax(1))

        for sizes, of_head in zip(self._sizes, logits, strict=True):
            place = torch.bucketize(of_head, SIZES, right=True).sub_(1).clamp_min_(0)
            sizes += torch.bincount(place, minlength=len(SIZES))

    @property
    def shares(self) -> Tensor:
        """The share of queries whose logit is of each of the `SIZES` or a little more, ``float64[kv_heads, sizes]``."""
        return self._sizes / self._sizes.sum(1, keepdim=True)

    def spread(self, *, by_bucket: bool = False) -> Spread:
        """The spread over all queries, ``[kv_heads]``, or by bucket, ``[kv_heads, buckets]``."""
        count, total, squares = self._count.expand_as(self._sum), self._sum, self._squares
        least, greatest = self._least, self._greatest
        if not by_bucket:
            count, total, squares = count.sum(1), total.sum(1), squares.sum(1)
            least, greatest = least.amin(1), greatest.amax(1)
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        return Spread(count, mean.float(), std.float(), least, greatest)
