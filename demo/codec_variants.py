"""The variants of the codec study: codecs as they are configured, and steps around them that might help."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3model.adapter import TransformersAdapter
from m3runtime.codecs import Codec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.plugins.construction import construct
from m3runtime.plugins.loading import load


@dataclass(frozen=True)
class Variant:
    """A codec, and a step before it encodes and after it decodes."""

    name: str
    codec: Mapping[str, Any]
    """The codec's section of a configuration."""
    around: "type[Around] | None" = None
    weighed: bool = True
    """Is training given the cost of errors?"""
    everywhere: bool = False
    """Are real texts read with it too, in addition to the facts?"""


class Around:
    """A step before encoding and after decoding. This one does nothing."""

    def __init__(self, adapter: TransformersAdapter) -> None:
        self.adapter = adapter

    def before(self, memories: MemoryTensors) -> MemoryTensors:
        """The memories to encode."""
        return memories

    def after(self, decoded: MemoryTensors, memories: MemoryTensors) -> MemoryTensors:  # noqa: ARG002 - others need the original
        """The memories that attention reads."""
        return decoded

    def importance(self, importance: Tensor) -> Tensor | None:
        """The cost of errors in the result of `before`; None: not known."""
        return importance

    def extra_bytes(self, tokens: int) -> float:  # noqa: ARG002 - others need the number
        """Bytes of a memory in addition to the codec's."""
        return 0.0


class BeforeRope(Around):
    """Keys as they are before the rotation by their positions, and rotated again after decoding."""

    def before(self, memories: MemoryTensors) -> MemoryTensors:
        return MemoryTensors(self._rotated(memories.keys, -1), memories.values, memories.tokens)

    def after(self, decoded: MemoryTensors, memories: MemoryTensors) -> MemoryTensors:
        return MemoryTensors(self._rotated(decoded.keys, 1), decoded.values, memories.tokens)

    def importance(self, importance: Tensor) -> Tensor | None:
        # The gradients' own rotation is not known any more. Of positions spread evenly, the mean is the block-wise
        # mean over the planes' angles: what an error costs is then the same in both channels of a plane.
        spec = self.adapter.spec
        half, n = spec.head_dim // 2, spec.kv_heads * spec.head_dim
        rotated = torch.zeros_like(importance)
        for count in range(0, spec.reference_tokens, 4):
            turn = torch.eye(2 * n)
            cos, sin = (x[count] for x in self._angles(spec.reference_tokens))
            for head in range(spec.kv_heads):
                at = head * spec.head_dim + torch.arange(half)
                turn[at, at] = turn[at + half, at + half] = cos[:half]
                turn[at, at + half], turn[at + half, at] = sin[:half], -sin[:half]
            rotated += turn @ importance @ turn.T
        return rotated / len(range(0, spec.reference_tokens, 4))

    def _angles(self, tokens: int) -> tuple[Tensor, Tensor]:
        first = len(self.adapter.sink_ids)
        positions = torch.arange(first, first + tokens)[None]
        cos, sin = self.adapter.model.model.rotary_emb(torch.zeros(1), positions)
        return cos[0], sin[0]

    def _rotated(self, keys: Tensor, sign: int) -> Tensor:
        cos, sin = self._angles(keys.shape[3])
        half = keys.shape[4] // 2
        turned = torch.cat([-keys[..., half:], keys[..., :half]], -1)
        return keys * cos + turned * (sign * sin)


class NormsApart(Around):
    """Keys of length one; each key's length is kept in two bytes."""

    def before(self, memories: MemoryTensors) -> MemoryTensors:
        norms = memories.keys.norm(dim=4, keepdim=True).clamp_min(1e-6)
        return MemoryTensors(memories.keys / norms, memories.values, memories.tokens)

    def after(self, decoded: MemoryTensors, memories: MemoryTensors) -> MemoryTensors:
        norms = memories.keys.norm(dim=4, keepdim=True).to(torch.float16).float()
        return MemoryTensors(decoded.keys * norms[:, :, :, : decoded.keys.shape[3]], decoded.values, memories.tokens)

    def importance(self, importance: Tensor) -> Tensor | None:
        return importance  # of unit keys it differs by about one factor for each head, which is not known

    def extra_bytes(self, tokens: int) -> float:
        return 2.0 * tokens * self.adapter.spec.vectors_per_token


class FirstWhole(Around):
    """The first tokens of a reference, on which much attention lies, are kept whole in bfloat16."""

    kept = 4

    def after(self, decoded: MemoryTensors, memories: MemoryTensors) -> MemoryTensors:
        for back, true in ((decoded.keys, memories.keys), (decoded.values, memories.values)):
            back[:, :, :, : self.kept] = true[:, :, :, : self.kept].to(torch.bfloat16)
        return decoded

    def extra_bytes(self, tokens: int) -> float:
        spec = self.adapter.spec
        return 4.0 * min(self.kept, tokens) * spec.vectors_per_token * spec.head_dim


def variants(*, everywhere: bool) -> Sequence[Variant]:
    """The rows of the study; the first is what the others are compared with."""
    raw = Variant("unquantised, bfloat16", {"kind": "raw", "dtype": "bfloat16"}, everywhere=True)
    scalar = [Variant(f"scalar int{bits}", {"kind": "scalar", "bits": bits}, everywhere=True) for bits in (8, 4)]
    classic = [
        Variant(f"product {k}/{v}, rotation {r}", {"kind": "product", "key_bytes": k, "value_bytes": v, "rotation": r})
        for k, v, r in ((32, 16, "none"), (32, 16, "pca"), (16, 16, "pca"))
    ]
    sizes = [
        Variant(f"product, {size} bytes", {"kind": "product", "bytes": size}, everywhere=True)
        for size in (24, 32, 41, 48, 56, 64)
    ]
    default = {"kind": "product", "bytes": 41}
    tried = [
        Variant("41 bytes, errors not weighed", default, weighed=False),
        Variant("41 bytes, each head by itself", {**default, "together": "head"}),
        Variant("41 bytes, keys before RoPE", default, BeforeRope),
        Variant("39 bytes, and norms of keys apart", {**default, "bytes": 39}, NormsApart),
        Variant("32 bytes, and the first 4 tokens whole", {**default, "bytes": 32}, FirstWhole),
    ]
    return [row for row in (raw, *scalar, *classic, *sizes, *tried) if row.everywhere or not everywhere]


def trained(
    variant: Variant, around: Around, sample: MemoryTensors, importance: Tensor, progress: Callable[[float], None]
) -> Codec:
    """The variant's codec, trained on a sample if it learns."""
    options = dict(variant.codec)
    codec: Codec = construct(load("codecs", options.pop("kind")), options, "codec", spec=around.adapter.spec)
    if not codec.trained:
        codec.fit(around.before(sample), around.importance(importance) if variant.weighed else None, progress)
    return codec


def coded(codec: Codec, around: Around, memories: MemoryTensors) -> MemoryTensors:
    """These memories as attention reads them, encoded and decoded."""
    decoded = codec.decode(codec.encode(around.before(memories)), memories.tokens, torch.float32)
    return around.after(decoded, memories)
