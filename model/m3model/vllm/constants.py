"""`Constants`: what of a bank's model vLLM needs and cannot compute: the sink's keys, and directions for biases.

They lie in the bank as one safetensors file, which `m3 calibrate-bias` writes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from m3runtime.errors import BankMissingError, ConfigError
from m3runtime.memory.spec import MemorySpec
from m3runtime.storage.files import write_atomically

NAME = "vllm.safetensors"


@dataclass(frozen=True, slots=True)
class Constants:
    """Constants of one model and one sink. All tensors are float32, on the CPU, of all layers of the model."""

    direction: Tensor
    """``[layers, kv_heads, head_dim]``: a key plus ``b`` times this has a logit that is higher by about ``b``."""
    sink: tuple[Tensor, Tensor]
    """Keys and values of the sink at positions from 0 on, ``[layers, kv_heads, tokens, head_dim]``."""
    sink_ids: tuple[int, ...]
    model: str
    """Fingerprint of the model."""
    spec: MemorySpec
    """The spec of the bank."""

    def write(self, bank: Path) -> None:
        """Store them in a bank."""
        about = {"model": self.model, "sink_ids": list(self.sink_ids), "spec": self.spec.to_json()}
        tensors = {"direction": self.direction, "sink_keys": self.sink[0], "sink_values": self.sink[1]}
        found = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(bank / NAME, save(found, {"m3": json.dumps(about)}))

    @classmethod
    def read(cls, bank: Path) -> "Constants":
        """Read them from a bank. Raises `BankMissingError` if there are none, and `ConfigError` if they are damaged."""
        path = bank / NAME
        if not path.is_file():
            raise BankMissingError(f"{path} is missing: vLLM needs it to read the bank; run `m3 calibrate-bias`")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["m3"])
                direction, keys, values = map(file.get_tensor, ("direction", "sink_keys", "sink_values"))
            found = cls(
                direction, (keys, values), tuple(about["sink_ids"]), about["model"], MemorySpec.from_json(about["spec"])
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is damaged ({error}); run `m3 calibrate-bias` again") from error
        layers, heads, dim = direction.shape
        if keys.shape != (layers, heads, len(found.sink_ids), dim) or keys.shape != values.shape:
            raise ConfigError(f"{path} is damaged: its tensors do not fit together; run `m3 calibrate-bias` again")
        if not all(torch.isfinite(one).all() for one in (direction, keys, values)):
            raise ConfigError(f"{path} is damaged: not all its numbers are finite; run `m3 calibrate-bias` again")
        return found
