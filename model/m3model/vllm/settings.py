"""What a connector is told by ``kv_connector_extra_config``: the bank, and the number of slots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from m3model.loading.fingerprint import ModelIdentity
from m3model.vllm import compat
from m3model.vllm.constants import Constants
from m3model.vllm.slots import CACHE_BYTES
from m3model.vllm.wish import Head
from m3runtime.bank.manifest import Manifest
from m3runtime.config.schema import Config
from m3runtime.config.section import Count, Section, Whole
from m3runtime.config.units import Size
from m3runtime.errors import BankMismatchError, ConfigError


class Settings(Section):
    """``kv_connector_extra_config: {"config": "m3.yaml"}``."""

    config: Path | dict[str, Any]
    """The configuration of the bank: its file, or all of it."""
    slots: Count | None = None
    """Tokens of memories of one request; null: as many as ``recall.memories`` have, up to the end of a block."""
    placeholder: Whole | None = None
    """The token that stands for a slot; null: see `placeholder_of`."""
    cache: Size = CACHE_BYTES
    """Most bytes of memories that each worker keeps rotated."""
    hosted: bool = False
    """Is the bank opened by an engine in this process?"""
    check_weights: bool = True
    """Compare the model's weights with those that wrote the bank."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Settings":
        """Read them. Raises `ConfigError`."""
        if "config" not in options:
            raise ConfigError('kv_connector_extra_config: say {"config": "m3.yaml"}, the configuration of the bank')
        try:
            return cls.model_validate(dict(options))
        except ValueError as error:
            raise ConfigError(f"kv_connector_extra_config: {error}") from error

    def load(self) -> Config:
        """The configuration."""
        if isinstance(self.config, Path):
            return Config.load(self.config)
        return Config.model_validate(self.config)


def head_of(settings: Settings, config: Config, constants: Constants, shape: compat.Shape, tokenizer: Any) -> Head:
    """The head of prompts. Raises `ConfigError` if there is no room for it."""
    sink = constants.sink_ids
    slots = settings.slots
    if slots is None:
        slots = slots_of(config, constants, shape.block)
    if len(sink) + slots >= shape.length:
        raise ConfigError(
            f"the sink and {slots} slots leave no room in a context of {shape.length} tokens; set a larger "
            "--max-model-len, or fewer slots in kv_connector_extra_config"
        )
    placeholder = settings.placeholder
    return Head(sink, slots, placeholder_of(tokenizer) if placeholder is None else placeholder)


def slots_of(config: Config, constants: Constants, block: int) -> int:
    """Slots for as many memories as a chunk may have; sink and slots together fill blocks of vLLM's cache."""
    sink = len(constants.sink_ids)
    wanted = sink + config.recall.memories * constants.spec.tokens
    return -(-wanted // block) * block - sink


def placeholder_of(tokenizer: Any) -> int:
    """The last special token without a meaning of its own, which text can spell; else the last token."""
    own = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    special = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special and id not in own]
    return max(special, default=len(tokenizer) - 1)


def check(config: Config, constants: Constants, shape: compat.Shape) -> None:
    """Raise `ConfigError` or `BankMismatchError` unless these constants fit the model and the configuration."""
    memory, spec = config.memory, constants.spec
    if (memory.sinks, memory.positions) != ("once", "parallel"):
        raise ConfigError("vLLM reads memories with memory.sinks once and memory.positions parallel alone")
    ours = (len(constants.direction), constants.direction.shape[1], constants.direction.shape[2])
    theirs = (shape.layers, shape.kv_heads, shape.head_dim)
    if ours != theirs or max(spec.layers) >= shape.layers:
        raise BankMismatchError(
            f"{config.bank}: the bank is of a model with {ours[0]} layers, {ours[1]} KV heads and head_dim {ours[2]}; "
            f"vLLM serves one with {theirs[0]}, {theirs[1]} and {theirs[2]}"
        )
    if not torch.isfinite(constants.direction).all():
        raise ConfigError(f"{config.bank}: the directions of biases are not finite; run `m3 calibrate-bias` again")


def check_manifest(manifest: Manifest, constants: Constants, where: Path) -> None:
    """Raise `BankMismatchError` unless the constants are of the model and the spec of a bank."""
    if (manifest.model, manifest.spec) != (constants.model, constants.spec):
        raise BankMismatchError(
            f"{where}: its constants for vLLM are of another model or spec than the bank; run `m3 calibrate-bias` again"
        )


def check_weights(manifest: Manifest, path: str, text_config: Any, where: Path) -> None:
    """Raise `BankMismatchError` unless the model that vLLM serves wrote the bank.

    Weights are known by a sample of each, as adapters know them; settings by name.
    """
    identity = ModelIdentity.of_checkpoint(Path(path), text_config)
    differences = identity.differences(manifest.model, manifest.model_settings)
    if differences is None:
        raise BankMismatchError(f"{where}: the bank was written by another model ({manifest.model_name}), not {path}")
    if differences:
        raise BankMismatchError(f"{where}: the bank was written with other settings: {', '.join(differences)}")
