"""`BiasDirections`: keys whose logits hardly depend on the query, of one model; and their file in a bank's folder.

Queries of a KV head have a large component in common. So there is a direction ``d`` that all of them meet with nearly
the same logit, scaled to one: a key ``k + b * d`` has its logit raised by ``b``, and a key ``-40 * d`` with a zero
value is a slot that no query sees. An attention that takes neither weights nor masks for its slots, such as a paged
cache's, can so have both. `m3 calibrate-bias` fits and measures them.

::

    bias.safetensors    beside the codec's files: directions and their measure, float32; all else as canonical JSON in
                        __metadata__ {"m3runtime": {"bias": {...}, "digest": "...", "format": 1}}

Reading it takes neither a model nor an adapter.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
class BiasFacts:
    """Everything about bias directions but their numbers."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    """Fingerprint of the model, as the bank's manifest has it."""
    model_name: str
    layers: tuple[int, ...]
    """The memory layers."""
    dtype: str
    """Dtype in which the model computed the queries."""
    offset: int
    """Position of the first query; keys of memories stand before it, where the adapter puts them."""
    length: int
    """Positions of queries, from ``offset`` on, over which the directions were fitted and measured."""
    null_level: float
    """A key of ``-null_level`` times the direction is a null slot."""
    null_weight: float
    """The greatest share of attention that one null slot took from any held-out query looked at."""
    weights: bool
    """Are the directions constant enough for weights? If not, they are good for null slots alone."""
    weight_error: float
    """The root mean square of ``logit - 1`` over held-out queries, in the median head."""


@dataclass(frozen=True, slots=True)
class BiasDirections:
    """Directions and their measure: the logit that held-out queries give a key of one direction, one at best."""

    facts: BiasFacts
    directions: Tensor
    """``float32[memory layers, kv_heads, head_dim]`` on the CPU, after RoPE: rotate them as the memories' keys.

    The model's scale of logits is in them: ``scale * q @ d`` is about one.
    """
    mean: Tensor
    """``float32[memory layers, kv_heads]``, as are the other three."""
    std: Tensor
    least: Tensor
    greatest: Tensor

    @property
    def null_keys(self) -> Tensor:
        """The keys of null slots, ``float32[memory layers, kv_heads, head_dim]``; their values are zeros."""
        return -self.facts.null_level * self.directions

    def raised(self, keys: Tensor, log_weight: float) -> Tensor:
        """Keys, ``[memory layers, kv_heads, tokens, head_dim]``, whose logits are raised by ``log_weight``.

        In float32, as one rounding is better than two. An attention temperature divides the keys before.
        """
        return keys.float() + log_weight * self.directions.to(keys.device)[:, :, None]

    def save(self, folder: Path) -> Path:
        """Write the file in a bank's folder, whole or not at all; returns its path. Raises `BankError`."""
        path = folder / BIAS
        tensors = self._tensors()
        record = asdict(self.facts)
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
        path = folder / BIAS
        if not path.exists():
            return None
        found = cls._read(path)
        if found.facts.model != manifest.model:
            raise BankMismatchError(
                f"{path}: of another model ({one_line(found.facts.model_name)}, {found.facts.model[:8]}), not "
                f"{manifest.model_name} ({manifest.model[:8]}); {_AGAIN}"
            )
        spec = manifest.spec
        wanted = (spec.layers, (len(spec.layers), spec.kv_heads, spec.head_dim))
        if (found.facts.layers, tuple(found.directions.shape)) != wanted:
            raise BankMismatchError(f"{path}: of other memory layers than the bank's; {_AGAIN}")
        return found

    def _tensors(self) -> dict[str, Tensor]:
        names = ("directions", "mean", "std", "least", "greatest")
        return {name: getattr(self, name).float().cpu().contiguous() for name in names}

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
            facts = _FACTS.validate_json(json.dumps(head["bias"]))
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
        if self.directions.ndim != 3:
            raise ValueError("its directions are not one vector for each layer and head")
        for name, tensor in self._tensors().items():
            shape = self.directions.shape if name == "directions" else self.directions.shape[:2]
            if tensor.shape != shape or not torch.isfinite(tensor).all():
                raise ValueError(f"its tensor {name} does not fit, or is not finite")


_FACTS = TypeAdapter(BiasFacts)


def _digest(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Thirty-two hex digits over all that the file says."""
    return fingerprint([dict(record), digests(tensors)])
