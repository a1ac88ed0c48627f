"""`KeptBytes`: payloads without the bytes of tokens that a head does not keep, see `MemorySpec.budgets`.

A codec encodes and decodes as if all heads kept as many tokens. In between, the bytes that belong to nothing are left
out of its payload, and are zeros again. Which those are follows from the spec and the codec, so nothing is stored for
it, and the payload of a short memory is still the beginning of a full one's.
"""

import math

import torch
from torch import Tensor

from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import kept


class KeptBytes:
    """The bytes that payloads of one codec keep. Thread-safe."""

    def __init__(self, spec: MemorySpec, fixed: int, heads: Tensor) -> None:
        """``fixed`` bytes stand before the tokens. ``heads`` says of which head each byte of a token is.

        It is ``int64`` on the CPU, and counts layers x KV heads.
        """
        exists = kept(spec, spec.tokens).flatten(0, 1)
        # Bytes of one head that stand together are copied together: a vector at a time is faster than a byte.
        self._run = math.gcd(*torch.unique_consecutive(heads, return_counts=True)[1].tolist())
        of_runs = exists[heads[:: self._run]].T
        self.fixed = fixed
        self._token = len(heads)
        self._ends = [0, *of_runs.sum(1).cumsum(0).tolist()]
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._here = of_runs.flatten().nonzero()[:, 0], exists[..., None]

    @classmethod
    def of(cls, spec: MemorySpec, fixed: int, heads: Tensor) -> "KeptBytes | None":
        """None where all heads keep as many tokens."""
        return cls(spec, fixed, heads) if spec.budgets else None

    def payload_bytes(self, tokens: int) -> int:
        """Bytes of the payload of so many tokens."""
        return self.fixed + int(self._ends[tokens]) * self._run

    def narrow(self, whole: Tensor) -> Tensor:
        """Payloads of full length without what belongs to nothing: ``uint8[n, payload_bytes(spec.tokens)]``."""
        places, _ = self._at(whole.device)
        return torch.cat([whole[:, : self.fixed], self._runs(whole).index_select(1, places).flatten(1)], 1)

    def widen(self, payloads: Tensor, width: int) -> Tensor:
        """Undo `narrow` for the first ``width`` tokens, with zeros for what belongs to nothing."""
        places, _ = self._at(payloads.device)
        count = self._ends[width]
        size = self.payload_bytes(width)
        whole = payloads.new_zeros(len(payloads), self.fixed + width * self._token)
        whole[:, : self.fixed] = payloads[:, : self.fixed]
        self._runs(whole).index_copy_(1, places[:count], self._runs(payloads[:, :size]))
        return whole

    def _runs(self, payloads: Tensor) -> Tensor:
        """A view of what follows the fixed bytes, ``uint8[n, runs, bytes of a run]``."""
        return torch.unflatten(payloads[:, self.fixed :], 1, (-1, self._run))

    def blank(self, *both: Tensor) -> None:
        """Set to zero, in place, what heads do not keep of keys and values ``[n, layers * kv_heads, tokens, any]``."""
        for x in both:
            _, exists = self._at(x.device)
            x.mul_(exists[:, : x.shape[2]])  # a tenth of the time of `masked_fill_`, and all values are finite

    def _at(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on:
            places, exists = self._here
            self._on[device] = places.to(device), exists.to(device)
        return self._on[device]
