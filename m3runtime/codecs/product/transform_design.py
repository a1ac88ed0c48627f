"""`TransformDesign`: vectors of a token are transformed together, and bytes go where errors cost most. The default.

An error ``e`` of a token's keys and values in one layer costs ``e @ importance @ e``. In coordinates in which that is
the plain squared error and which are uncorrelated (a Karhunen-Loève transform after whitening by the importance), each
can be quantised for itself, with the bits that `m3runtime.codecs.product.transform_training` gives it. So the heads of
a layer share what they have in common, a layer that matters gets more bytes than one that does not, and channels that
no query looks at get none.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from m3runtime.codecs.base import Progress
from m3runtime.codecs.files import check_tensors
from m3runtime.codecs.product.quantiser import Design
from m3runtime.codecs.product.transform import CENTROIDS, WIDTHS, Transform, Units, kept_by
from m3runtime.codecs.product.transform_quantiser import TransformQuantiser
from m3runtime.codecs.product.transform_training import train_transform
from m3runtime.codecs.steps import Steps
from m3runtime.errors import CodecError
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors

TOGETHER = ("layer", "head")
_SHARE = 48 / 64
"""Bytes for each channel of a head, key and value together, by default."""


class TransformDesign(Design):
    """A key and a value of one head in ``bytes`` bytes together, on average over layers and heads.

    The default is 3/16 of what they take in bfloat16: 48 for a head of 64 channels. docs/codecs.md says why.

    With ``together="layer"``, the default, keys and values of all heads of a layer are one vector; with ``head`` each
    key and each value is one by itself: less to compute, and more bytes for the same error. Heads with budgets of their
    own need ``head``, which is their default. Raises `CodecError` for options that do not fit the spec.
    """

    def __init__(self, spec: MemorySpec, bytes: int | None = None, together: str | None = None) -> None:
        super().__init__(spec)
        if together is None:
            together = "head" if spec.budgets else "layer"
        bytes = max(1, round(_SHARE * spec.head_dim)) if bytes is None else bytes
        if type(bytes) is not int or bytes not in range(1, 2 * spec.head_dim + 1):
            most = 2 * spec.head_dim
            raise CodecError(f"bytes of the product codec must be a whole number from 1 to {most}, not {bytes!r}")
        if together not in TOGETHER:
            raise CodecError(f"together of the product codec must be one of {', '.join(TOGETHER)}, not {together!r}")
        if spec.budgets and together != "head":
            raise CodecError("together of the product codec must be head where heads keep different numbers of tokens")
        self.units = Units(spec, together)
        self.options = {"bytes": bytes, "together": together}
        self.fixed_bytes, self.token_bytes = 0, -(-bytes * spec.numbers_per_token // (2 * spec.head_dim))
        n = self.units.channels
        self.learned_bytes = 4 * self.units.count * n * (1 + 2 * n + CENTROIDS)

    def fit(
        self, sample: MemoryTensors, importance: Tensor | None, progress: Progress | None, steps: Steps
    ) -> TransformQuantiser:
        """Train a quantiser: see `Design.fit`.

        Without importance, an error costs its square relative to the mean square of its head's vectors.
        """
        of_units = None if importance is None else self._blocks(importance)

        def costs(unit: int, vectors: Tensor) -> Tensor:
            return self._by_power(vectors) if of_units is None else of_units[unit]

        vectors = partial(self.units.sample, sample)
        return TransformQuantiser(train_transform(self.units, vectors, costs, self._most, progress, steps))

    @property
    def _most(self) -> int:
        """Most codes of a full memory."""
        return self.most_bytes(self.spec.tokens)

    def _codes(self, parts: Tensor) -> int:
        """Codes of a full memory."""
        if not self.spec.budgets:  # and any number of heads in a file
            return len(parts) * self.spec.tokens
        return int(self.units.budgets[parts[:, 0].long()].sum())

    def restore(self, tensors: Mapping[str, Tensor]) -> TransformQuantiser:
        """The quantiser of learned tensors: see `Design.restore`."""
        parts = tensors.get("parts")
        if parts is None or parts.dtype != torch.int32 or parts.ndim != 2 or parts.shape[1] != 3:
            raise CodecError("tensor 'parts' is not int32 [parts, 3]")
        listed, units, channels = parts.tolist(), self.units.count, self.units.channels
        width = [part[2] for part in listed]
        fit = all(0 <= u < units and 0 <= f < f + w <= channels and w in WIDTHS for u, f, w in listed)
        # What is covered is counted only where widths are some that can be: they may be any number of a file.
        covered = {(u, at) for u, f, w in listed for at in range(f, f + w)} if fit else set()
        apart = len(covered) == sum(width)  # or what a coordinate is would depend on which part comes last
        within = fit and self._codes(parts) <= self._most
        if not within or not apart or listed != sorted(listed, key=_order):
            raise CodecError("tensor 'parts' does not describe parts of these vectors")
        rows = sum(kept_by(parts, units))
        wanted: dict[str, tuple[int, ...]] = {
            "mean": (units, channels),
            "forward": (rows, channels),
            "inverse": (rows, channels),
        }
        wanted |= {f"width{size}": (width.count(size), CENTROIDS, size) for size in WIDTHS}
        check_tensors({name: tensor for name, tensor in tensors.items() if name != "parts"}, wanted)
        return TransformQuantiser(Transform.of(self.units, tensors))

    def _by_power(self, vectors: Tensor) -> Tensor:
        """The cost of errors of one unit without importance, ``float64[channels, channels]``."""
        centred = (vectors - vectors.mean(0)).double()
        power = torch.unflatten(centred.square().mean(0), 0, (-1, self.spec.head_dim))
        weight = 1 / power.sum(1, keepdim=True).clamp_min(1e-12)
        return torch.diag(weight.expand_as(power).flatten())

    def _blocks(self, importance: Tensor) -> Tensor:
        """The cost of errors, ``float64[units, channels, channels]``."""
        n = 2 * self.spec.kv_heads * self.spec.head_dim
        if importance.shape != (len(self.spec.layers), n, n) or not torch.isfinite(importance).all():
            raise CodecError(f"importance must be finite [{len(self.spec.layers)}, {n}, {n}]")
        if self.units.together == "layer":
            return importance.double()
        dim = self.spec.head_dim
        blocks = importance.view(-1, 2, self.spec.kv_heads, dim, 2, self.spec.kv_heads, dim)
        own = torch.stack([blocks[:, kind, h, :, kind, h] for kind in (0, 1) for h in range(self.spec.kv_heads)], 1)
        keys_first = torch.unflatten(own, 1, (2, self.spec.kv_heads)).transpose(0, 1)
        return keys_first.reshape(self.units.count, dim, dim).double()


def _order(part: Sequence[int]) -> tuple[int, int, int]:
    unit, first, width = part
    return width, unit, first
