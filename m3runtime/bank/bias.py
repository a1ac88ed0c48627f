"""`BiasDirections`: keys whose logits hardly depend on the query, of one model; and their file in a bank's folder.

Queries of a KV head have a large component in common. So there is a direction ``d`` that all of them meet with nearly
the same logit, scaled to one: a key ``k + b * d`` has its logit raised by ``b``, and a key ``-40 * d`` with a zero
value is a slot that no query sees. An attention that takes neither weights nor masks for its slots, such as a paged
cache's, can so have both. `m3 calibrate-bias` fits and measures them.

::

    bias.safetensors    next to the codec's files: directions, their measure and the sink, float32; all else as
                        canonical JSON in __metadata__ {"m3runtime": {"bias": {...}, "digest": "...", "format": 1}}

Reading it takes neither a model nor an adapter, and so the sink is in it, which has to stand in slots as well.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from m3runtime.bank.manifest import Manifest
from m3runtime.codecs.files import digests
from m3runtime.errors import BankError, BankMismatchError
from m3runtime.memory.spec import canonical_json, fingerprint
from m3runtime.plugins.messages import first_fault, one_line
from m3runtime.storage.files import open_regular, write_atomically

BIAS = "bias.safetensors"
FORMAT = 1
_KEY = "m3runtime"
_MOST = 256 << 20
"""Bytes of a file at most."""
_AGAIN = "remove it, and run `m3 calibrate-bias` again"


@dataclass(frozen=True, slots=True)
class BiasStretch:
    """The measure over held-out queries of one stretch of positions; it begins where the one before ends."""

    end: int
    """The first position beyond it."""
    error: float
    """As `BiasFacts.weight_error`."""
    least: float
    """The least logit of any query for any head's direction; they should be one."""
    greatest: float


@dataclass(frozen=True, slots=True)
class BiasFacts:
    """All about bias directions but their numbers."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    """Fingerprint of the model, as the bank's manifest has it."""
    model_name: str
    layers: tuple[int, ...]
    """The memory layers; the file has directions of all layers, as slots are empty in the others."""
    sink_ids: tuple[int, ...]
    """The tokens of the sink."""
    dtype: str
    """Dtype in which the model computed the queries."""
    offset: int
    """Position of the first query; keys of memories stand before it, where the adapter puts them."""
    length: int
    """Positions of queries, from ``offset`` on, over which the directions were fitted and measured."""
    null_level: float = 0.0
    """A key of ``-null_level`` times the direction is a null slot."""
    null_weight: float = 0.0
    """The share of attention that 1,024 null slots take in the worst head, on average over held-out queries."""
    weights: bool = False
    """Are the directions constant enough for weights? If not, they are good for null slots alone."""
    weight_error: float = 0.0
    """The root mean square of a query's logit less one, in the median head: the relative error of a log weight."""
    greatest_error: float = 0.0
    """The same in the worst head."""
    stretches: tuple[BiasStretch, ...] = ()
    """The measure by position."""


@dataclass(frozen=True, slots=True)
class BiasDirections:
    """Directions and their measure: the logit that held-out queries give a key of one direction, one at best.

    All tensors are float32 and on the CPU, of all layers of the model, and keys are as after RoPE.
    """

    facts: BiasFacts
    directions: Tensor
    """``[layers, kv_heads, head_dim]``. Whoever moves keys to other positions rotates these with them.

    The model's scale of logits is in them: ``scale * q @ d`` is about one.
    """
    mean: Tensor
    """``[layers, kv_heads]``, as are the other three."""
    std: Tensor
    least: Tensor
    greatest: Tensor
    sink_keys: Tensor
    """``[layers, kv_heads, tokens, head_dim]``, at positions from 0 on."""
    sink_values: Tensor

    @property
    def null_keys(self) -> Tensor:
        """The keys of null slots, ``[layers, kv_heads, head_dim]``; their values are zeros."""
        return -self.facts.null_level * self.directions

    def raised(self, keys: Tensor, log_weight: float) -> Tensor:
        """Keys, ``[memory layers, kv_heads, tokens, head_dim]``, whose logits are raised by ``log_weight``.

        In float32, as one rounding is better than two. An attention temperature divides the keys before.
        """
        return keys.float() + log_weight * self.directions[list(self.facts.layers), :, None].to(keys.device)

    def save(self, folder: Path) -> Path:
        """Write the file in a bank's folder, whole or not at all; returns its path. Raises `BankError`."""
        path = folder / BIAS
        tensors = self._tensors()
        record = json.loads(canonical_json(asdict(self.facts)))
        head = {"bias": record, "digest": _digest(record, tensors), "format": FORMAT}
        try:
            write_atomically(path, safetensors.torch.save(tensors, {_KEY: canonical_json(head)}))
        except OSError as error:
            raise BankError(f"{path}: cannot be written: {error.strerror}") from error
        return path

    @classmethod
    def load(cls, folder: Path, manifest: Manifest) -> "BiasDirections | None":
        """The directions in the folder of a bank with this manifest, or None if it has no file.

        Raises `BankError` if the file is damaged, and `BankMismatchError` if it is of another model or other layers.
        """
        path, found = folder / BIAS, cls.read(folder)
        if found is None:
            return None
        if found.facts.model != manifest.model:
            raise BankMismatchError(
                f"{path}: of another model ({one_line(found.facts.model_name)}, {found.facts.model[:8]}), not "
                f"{manifest.model_name} ({manifest.model[:8]}); {_AGAIN}"
            )
        spec = manifest.spec
        if (found.facts.layers, *found.directions.shape[1:]) != (spec.layers, spec.kv_heads, spec.head_dim):
            raise BankMismatchError(f"{path}: of other memory layers or heads than the bank's; {_AGAIN}")
        return found

    @classmethod
    def read(cls, folder: Path) -> "BiasDirections | None":
        """The directions in a bank's folder, of whatever model, or None if it has no file.

        For whoever has not opened the bank. Raises `BankError` if the file is damaged.
        """
        path = folder / BIAS
        return cls._read(path) if path.exists() else None

    def _tensors(self) -> dict[str, Tensor]:
        of_tensors = (one.name for one in fields(self) if one.name != "facts")
        return {name: getattr(self, name).float().cpu().contiguous() for name in of_tensors}

    @classmethod
    def _read(cls, path: Path) -> "BiasDirections":
        try:
            with open_regular(path) as file:
                data = file.read(_MOST)
            tensors = safetensors.torch.load(data)
            head = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][_KEY])
            if head["format"] != FORMAT:
                raise ValueError(f"format {head['format']}, this release reads {FORMAT}")
            if head["digest"] != _digest(head["bias"], tensors):
                raise ValueError("its digest does not match")
            facts = _FACTS.validate_python(head["bias"])
            found = cls(facts, **{name: tensor.clone() for name, tensor in tensors.items()})
            found._check()
            return found
        except OSError as error:
            raise BankError(f"{path}: cannot be read: {error.strerror}") from error
        except (SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
            fault = first_fault(error) if isinstance(error, ValidationError) else error
            raise BankError(
                f"{path}: damaged, or not a file of bias directions: {one_line(fault)}; {_AGAIN}"
            ) from error

    def _check(self) -> None:
        layers, heads, dim = self.directions.shape  # a ValueError, if it has another number of dimensions
        sink = (layers, heads, len(self.facts.sink_ids), dim)
        of_keys = {"directions": (layers, heads, dim), "sink_keys": sink, "sink_values": sink}
        for name, tensor in self._tensors().items():
            if tuple(tensor.shape) != of_keys.get(name, (layers, heads)) or not torch.isfinite(tensor).all():
                raise ValueError(f"its tensor {name} does not fit, or is not finite")
        if not all(0 <= one < layers for one in self.facts.layers):
            raise ValueError("its memory layers are not among its layers")


_FACTS = TypeAdapter(BiasFacts)


def _digest(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Thirty-two hex digits over all that the file says."""
    return fingerprint([dict(record), digests(tensors)])
