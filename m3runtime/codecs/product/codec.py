"""The `product` codec: a vector quantiser, trained on the bank's own memories."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from m3runtime.codecs import layout
from m3runtime.codecs.base import Codec, Progress
from m3runtime.codecs.files import Distortion
from m3runtime.codecs.kept import KeptBytes
from m3runtime.codecs.limit import held_out
from m3runtime.codecs.product.quantiser import Design, Quantiser
from m3runtime.codecs.product.residual_design import ResidualDesign
from m3runtime.codecs.product.transform_design import TransformDesign
from m3runtime.codecs.steps import Steps
from m3runtime.device.copies import to_host
from m3runtime.errors import CodecError
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.plugins.loading import require


@dataclass(frozen=True)
class _State:
    """Replaced as a whole when the codec is trained, so that a thread sees all of it or nothing."""

    quantiser: Quantiser
    measured: Distortion | None
    kept: KeptBytes | None
    on: dict[torch.device, Quantiser] = field(default_factory=dict)  # copies, made when first asked for


class ProductCodec(Codec):
    """Vectors are replaced by the nearest of centroids that were learned on the bank's own memories.

    ``bytes`` and ``together`` are those of `TransformDesign`, the default; the others are those of `ResidualDesign`,
    which quantises each vector by itself. `fit` needs faiss (``m3runtime[train]``); nothing else does. `encode` and
    `decode` run on the device of their arguments. Thread-safe after `fit` or `load`. Raises `CodecError` for options
    that do not fit the spec, or each other.
    """

    kind: ClassVar[str] = "product"

    def __init__(
        self,
        spec: MemorySpec,
        key_bytes: int | None = None,
        value_bytes: int | None = None,
        scope: str | None = None,
        *,
        keys: str | None = None,
        values: str | None = None,
        rotation: str | None = None,
        offset: bool | None = None,
        preset: str | None = None,
        bytes: int | None = None,
        together: str | None = None,
    ) -> None:
        super().__init__(spec)
        levels = _given(key_bytes=key_bytes, value_bytes=value_bytes, scope=scope, keys=keys, values=values)
        levels |= _given(rotation=rotation, offset=offset, preset=preset)
        transform = _given(bytes=bytes, together=together)
        if levels and transform:
            raise CodecError(
                f"{next(iter(transform))} of the product codec cannot be set together with {next(iter(levels))}"
            )
        self.design: Design = ResidualDesign(spec, levels) if levels else TransformDesign(spec, **transform)
        self._state: _State | None = None

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of the design, every one stated."""
        return self.design.options

    @property
    def trained(self) -> bool:
        """True after `fit`, `load` or `restore`: see `Codec.trained`."""
        return self._state is not None

    @property
    def weighs_errors(self) -> bool:
        """True for the transform: see `Codec.weighs_errors`."""
        return isinstance(self.design, TransformDesign)

    @property
    def measured(self) -> Distortion | None:
        """Distortion on the held-out part of the sample; None before `fit`, and for a sample of one."""
        return None if self._state is None else self._state.measured

    def payload_bytes(self, tokens: int) -> int:
        """Bytes of a payload; before training, the most that it can have: see `Codec.payload_bytes`."""
        if self._state is None:
            return self.design.most_bytes(tokens)
        kept, of = self._state.kept, self._state.quantiser
        return of.fixed_bytes + tokens * of.token_bytes if kept is None else kept.payload_bytes(tokens)

    def check_fit(self) -> None:
        """Raise `PluginError` if faiss is missing: see `Codec.check_fit`."""
        require("training the product codec", "train")

    def fit(
        self,
        sample: MemoryTensors,
        importance: Tensor | None = None,
        progress: Progress | None = None,
        steps: Steps | None = None,
    ) -> None:
        """Train on all but the last eighth of a sample (at least one memory), and measure on the rest.

        Takes a few hundred MB besides the sample, and for `ResidualDesign` half as much as the sample again.
        Deterministic. About 50 references of 100 tokens are enough. Runs on the CPU on ``torch.get_num_threads()``
        threads; ``progress`` is called from the caller's. Raises `CodecError` if the sample is empty or does not fit,
        `PluginError` if faiss is missing.
        """
        self.check_fit()
        sample.check(self.spec)
        if not len(sample):
            raise CodecError("the product codec cannot be trained on no memories")
        for i in range(len(sample)):
            layout.check_finite(sample, i, self.spec)
        cut = len(sample) - held_out(len(sample))
        quantiser = self.design.fit(sample.rows(slice(0, cut)), importance, progress, steps or Steps())
        measured = None
        if cut < len(sample):
            judge = type(self)(self.spec, **self.options)
            judge._state = self._state_of(quantiser, None)
            measured = judge.distortion(sample.rows(slice(cut, None)))
        self._state = self._state_of(quantiser, measured)

    def _state_of(self, quantiser: Quantiser, measured: Distortion | None) -> _State:
        kept = KeptBytes(self.spec, quantiser.fixed_bytes, quantiser.heads_of_bytes) if self.spec.budgets else None
        return _State(quantiser, measured, kept)

    def encode(self, memories: MemoryTensors) -> Tensor:
        """Payloads of memories, ``uint8[n, bytes]`` on the CPU: see `Codec.encode`."""
        device = memories.keys.device
        quantiser, kept = self._on(device), self._ready().kept
        memories.check(self.spec)
        size = (len(memories), quantiser.fixed_bytes + self.spec.tokens * quantiser.token_bytes)
        rows = torch.zeros(size, dtype=torch.uint8, device=device)
        if device.type != "cpu":  # in one go: each copy, and each look at a number, would wait for the device
            quantiser.encode_all(layout.all_vectors(memories, self.spec), memories.tokens.tolist(), rows)
            return to_host(rows if kept is None else kept.narrow(rows))
        for i, row in enumerate(rows):
            # One memory at a time: a matrix product may round otherwise in a larger batch.
            vectors = layout.vectors(memories, i, self.spec)
            quantiser.encode(vectors, row[: quantiser.fixed_bytes + vectors[0].shape[1] * quantiser.token_bytes])
        return rows if kept is None else kept.narrow(rows)

    def decode(self, payloads: Tensor, tokens: Tensor, dtype: torch.dtype) -> MemoryTensors:
        """Decode payloads on their device; refuses no bytes and never waits for it: see `Codec.decode`."""
        quantiser, kept = self._on(payloads.device), self._ready().kept
        width = layout.width_of(payloads, tokens, self)
        if kept is not None:
            payloads = kept.widen(payloads, width)
        # Rounded products may exceed the peak a little.
        fits = quantiser.peak * 1.01 <= torch.finfo(dtype).max
        keys, values = quantiser.decode(payloads, width, dtype if fits else torch.float32)
        if kept is not None:
            kept.blank(keys, values)
        return layout.finish(keys, values, tokens, self.spec, dtype, quantiser.peak)

    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors of the trained quantiser: see `Codec.tensors`."""
        return self.quantiser.tensors()

    def learned_bytes(self) -> int:
        """Bytes of the trained tensors, or the most that this design learns: see `Codec.learned_bytes`."""
        return super().learned_bytes() if self.trained else self.design.learned_bytes

    def restore(self, tensors: Mapping[str, Tensor], measured: Distortion | None = None) -> None:
        """Take what a quantiser learned elsewhere: see `Codec.restore`."""
        quantiser = self.design.restore(tensors)
        if not quantiser.peak < torch.finfo(torch.bfloat16).max:
            raise CodecError("its values are too large")
        self._state = self._state_of(quantiser, measured)

    @property
    def quantiser(self) -> Quantiser:
        """The trained quantiser, on the CPU. Raises `CodecError` if the codec is not trained."""
        return self._ready().quantiser

    def _ready(self) -> _State:
        if self._state is None:
            raise CodecError("the product codec is not trained: call fit, or load a trained one")
        return self._state

    def _on(self, device: torch.device) -> Quantiser:
        state = self._ready()
        if device not in state.on:
            state.on[device] = state.quantiser if device.type == "cpu" else state.quantiser.to(device)
        return state.on[device]


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
