"""The `Codec` contract."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from m3runtime.codecs import files
from m3runtime.codecs.files import Distortion
from m3runtime.codecs.steps import Steps
from m3runtime.errors import CodecError
from m3runtime.memory.spec import MemorySpec, fingerprint
from m3runtime.memory.tensors import MemoryTensors, kept
from m3runtime.plugins.messages import one_line

Progress = Callable[[float], None]
"""Called with the share of the work done, in [0, 1]."""


class Codec(ABC):
    """Encodes and decodes memories of one spec.

    Deterministic: equal memories give equal bytes. Payloads are token-major, so that the payload of a short memory is a
    prefix of a full one's layout: ``payload_bytes(tokens)`` bytes. Thread-safe after `fit` or `load`. What heads do not
    keep (`MemorySpec.budgets`) is not read, takes no bytes, and decodes to zeros.
    """

    kind: ClassVar[str]

    def __init__(self, spec: MemorySpec) -> None:
        self.spec = spec

    @property
    @abstractmethod
    def options(self) -> Mapping[str, Any]:
        """The constructor's keyword arguments besides ``spec``, as JSON values."""

    @property
    def fingerprint(self) -> str:
        """Thirty-two hex digits over kind, spec, options and what was trained. Raises `CodecError` if untrained."""
        of = {"kind": self.kind, "spec": self.spec.to_json(), "options": dict(self.options)}
        return fingerprint({**of, "tensors": files.digests(self.tensors())})

    @property
    def trained(self) -> bool:
        """True if `encode` and `decode` can be used: always, for codecs that learn nothing."""
        return True

    @property
    def measured(self) -> Distortion | None:
        """The distortion that `fit` measured on the part of its sample that it did not train on, if it did."""
        return None

    @property
    def weighs_errors(self) -> bool:
        """True if `fit` uses an importance."""
        return False

    def check_fit(self) -> None:  # noqa: B027 - most learn nothing
        """Raise `PluginError` if a package is missing that `fit` needs."""

    def fit(  # noqa: B027 - most learn nothing
        self,
        sample: MemoryTensors,
        importance: Tensor | None = None,
        progress: Progress | None = None,
        steps: Steps | None = None,
    ) -> None:
        """Train on a sample of memories; a codec that learns nothing does nothing. Raises `CodecError` if too few.

        ``steps`` keeps what parts of the training computed: interrupted and called again with the same sample, it goes
        on.

        ``importance`` says what errors cost, where that is known: ``float32[layers, n, n]`` on the CPU with ``n`` of
        ``2 * kv_heads * head_dim``, one matrix for each memory layer over the channels of a token, keys of all heads
        first, then values. An error ``e`` costs ``e @ importance @ e``. See
        `m3runtime.adapters.base.Adapter.importance`.
        """

    def tensors(self) -> Mapping[str, Tensor]:
        """The trained tensors by name, on the CPU; none if it learns nothing. Raises `CodecError` if untrained."""
        return {}

    def learned_bytes(self) -> int:
        """Bytes of the trained tensors; before training, about the most that they can take."""
        return sum(tensor.nbytes for tensor in self.tensors().values()) if self.trained else 0

    def restore(self, tensors: Mapping[str, Tensor], measured: Distortion | None = None) -> None:  # noqa: ARG002
        """Take trained tensors, on the CPU and aligned. Raises `CodecError` if these options do not learn such."""
        files.check_tensors(tensors, {})

    @abstractmethod
    def payload_bytes(self, tokens: int) -> int:
        """Bytes of the payload of a memory of that many tokens. Never falls as ``tokens`` grows."""

    @abstractmethod
    def encode(self, memories: MemoryTensors) -> Tensor:
        """``uint8[n, payload_bytes(spec.tokens)]`` on the CPU; bytes beyond a memory's own payload are zero.

        Raises `CodecError` if untrained, or if the memories do not fit the spec or are not finite.
        """

    @abstractmethod
    def decode(self, payloads: Tensor, tokens: Tensor, dtype: torch.dtype) -> MemoryTensors:
        """Decode ``uint8[n, at least payload_bytes(max(tokens))]`` on the device that ``payloads`` lies on.

        ``tokens`` is ``int64[n]`` on the CPU. The result has ``max(tokens)`` tokens, and zeros beyond each memory's
        own. Finite for any bytes, or `BlockError`.
        """

    def distortion(self, memories: MemoryTensors) -> Distortion:
        """Measure `Distortion` on memories, which should not be those that the codec was trained on."""
        decoded = self.decode(self.encode(memories), memories.tokens, torch.float32)
        width = decoded.keys.shape[3]
        exists = memories.exists()[:, None, None, :width, None] & kept(self.spec, width)[..., None]

        def relative(true: Tensor, back: Tensor) -> float:
            true = torch.where(exists, true[:, :, :, :width].float().cpu(), 0.0)
            error = (back.cpu() - true).square().sum(dtype=torch.float64)
            return float(error / true.square().sum(dtype=torch.float64).clamp_min(1e-30))

        return Distortion(relative(memories.keys, decoded.keys), relative(memories.values, decoded.values))

    def save(self, path: Path) -> None:
        """Write one safetensors file, by temporary file and rename. Raises `CodecError` if untrained."""
        files.write(path, files.CodecFile(self.kind, self.spec, self.options, self.tensors(), self.measured))

    @classmethod
    def load(cls, path: Path, spec: MemorySpec) -> Self:
        """Read what `save` wrote. Raises `CodecError` if the file is damaged or of another spec or kind."""
        file = files.read(path)
        if file.kind != cls.kind:
            raise CodecError(f"{path}: holds a codec of kind {one_line(repr(file.kind))}, not {cls.kind!r}")
        if file.spec != spec:
            raise CodecError(f"{path}: the codec is of another spec: {one_line(file.spec.difference(spec))}")
        try:
            codec = cls(spec, **file.options)
            # The clones are aligned, whatever the file was: several floats are read as one number.
            codec.restore({name: tensor.clone() for name, tensor in file.tensors.items()}, file.measured)
        except (TypeError, CodecError, RecursionError) as error:
            raise CodecError(f"{path}: options or tensors do not fit: {one_line(error)}") from error
        return codec
