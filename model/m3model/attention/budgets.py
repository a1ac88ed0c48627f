"""`Lacking`: hides from each KV head the columns of memories that it does not have: see `MemorySpec.budgets`.

Buffers of keys and values have room for the most tokens that a head keeps. Where heads differ, a number for each memory
layer and head is added to the mask that all layers share: one for each two vectors of keys and values.
"""

import torch
from torch import Tensor


class Lacking:
    """What is added to the logits of memory columns, by memory layer and KV head: zero, or -inf where a head has none.

    The columns are those of the memory region, which is filled from its right end. What is added has no meaning in
    columns where no memory stands: the shared mask hides them.
    """

    def __init__(self, budgets: Tensor) -> None:
        """``budgets`` is ``int64[memory layers, kv_heads]``: the most tokens of a memory that each head has."""
        self._budgets = budgets[..., None]
        self.added = torch.zeros(*budgets.shape, 0, 0).transpose(1, 2)
        """``[memory layers, rows, kv_heads, region]``."""

    @property
    def heads(self) -> int:
        """Memory layers x KV heads."""
        return self._budgets.numel()

    def resize(self, rows: int, region: int, like: Tensor) -> None:
        """Make room for so many rows and columns, of the dtype and device of ``like``; the right end is kept."""
        layers, before, heads, columns = self.added.shape
        new = like.new_zeros(layers, rows, heads, region)
        rows, columns = min(rows, before), min(region, columns)
        if rows and columns:
            new[:, :rows, :, region - columns :] = self.added[:, :rows, :, -columns:]
        self.added = new

    def write(self, row: int, columns: slice) -> None:
        """A memory stands in these columns of a row from now on."""
        places = torch.arange(columns.stop - columns.start)
        hidden = self.added.new_zeros(*self._budgets.shape[:2], len(places), device="cpu")
        hidden.masked_fill_(places >= self._budgets, -torch.inf)
        self.added[:, row, :, columns].copy_(hidden, non_blocking=True)

    def move(self, row: int, to: int) -> None:
        """Move a row to another one."""
        self.added[:, to] = self.added[:, row]


def with_added(mask: Tensor, added: Tensor) -> Tensor:
    """A mask ``[B, 1, Q, K]`` for each KV head, ``[B, kv_heads, Q, K]``.

    ``added`` is ``[B, kv_heads, columns]`` of `Lacking.added`, of the first columns of the mask.
    """
    columns = added.shape[2]
    memories = mask[..., :columns] + added[:, :, None].to(mask.dtype)
    rest = mask[..., columns:].expand(-1, added.shape[1], -1, -1)
    return torch.cat([memories, rest], 3)


def by_query_head(mask: Tensor, heads: int) -> Tensor:
    """A mask ``[B, 1 or kv_heads, Q, K]`` as attention of so many query heads adds it, ``[B, 1 or heads, Q, K]``."""
    return mask if mask.shape[1] in (1, heads) else mask.repeat_interleave(heads // mask.shape[1], 1)
