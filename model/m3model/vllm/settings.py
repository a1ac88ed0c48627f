"""What a connector is told by ``kv_connector_extra_config``: the bank, and the number of slots."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3model.loading import gguf
from m3model.loading.fingerprint import ModelIdentity
from m3model.vllm.slots import CACHE_BYTES
from m3model.vllm.wish import Head
from m3runtime.bank.bias import BIAS, BiasDirections
from m3runtime.bank.manifest import Manifest
from m3runtime.config.schema import Config
from m3runtime.config.section import Count, Section, Whole
from m3runtime.config.units import Size
from m3runtime.errors import BankMismatchError, BankMissingError, ConfigError
from m3runtime.memory.shape import kept_tokens

if TYPE_CHECKING:  # a client that builds prompts needs no vLLM
    from m3model.vllm import compat


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


def checkpoint_of(config: Config) -> str:
    """The folder or name of the model for vLLM: of a GGUF file, the folder that it was converted into.

    Raises `ConfigError` if it was not converted yet.
    """
    path = config.model.path
    if not path.endswith(".gguf"):
        return path
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"model.path: no such file: {path}")
    if not (folder := gguf.folder_of(file)).is_dir():
        raise ConfigError(f"model.path: {path} is not converted yet; `m3 init` and `m3 write` do it")
    return str(folder)


def head_of(settings: Settings, config: Config, bias: BiasDirections, shape: "compat.Shape", tokenizer: Any) -> Head:
    """The head of prompts. Raises `ConfigError` if there is no room for it."""
    sink = bias.facts.sink_ids
    slots = slots_of(config, bias, shape.block) if settings.slots is None else settings.slots
    if len(sink) + slots >= shape.length:
        raise ConfigError(
            f"the sink and {slots} slots leave no room in a context of {shape.length} tokens; set a larger "
            "--max-model-len, or fewer slots in kv_connector_extra_config"
        )
    placeholder = settings.placeholder
    return Head(sink, slots, placeholder_of(tokenizer) if placeholder is None else placeholder)


def bias_of(bank: Path) -> BiasDirections:
    """The bias directions of a bank, and its sink. Raises `BankMissingError` if there are none, and `BankError`."""
    found = BiasDirections.read(bank)
    if found is None:
        raise BankMissingError(
            f"{bank / BIAS} is missing: without it vLLM cannot read the bank; run `m3 calibrate-bias`"
        )
    return found


def width_of(bias: BiasDirections) -> int:
    """The width of the interval of positions that memories share."""
    return bias.facts.offset - len(bias.facts.sink_ids)


def slots_of(config: Config, bias: BiasDirections, block: int) -> int:
    """Slots for as many memories as a chunk may have; sink and slots together fill blocks of vLLM's cache."""
    sink, is_dense = len(bias.facts.sink_ids), config.memory.tokens_per_head == "all"
    wanted = sink + config.recall.memories * (width_of(bias) if is_dense else kept_tokens(config.memory))
    return -(-wanted // block) * block - sink


def placeholder_of(tokenizer: Any) -> int:
    """The last special token without a meaning of its own, which text can spell; else the last token."""
    own = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    special = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special and id not in own]
    return max(special, default=len(tokenizer) - 1)


def check(config: Config, bias: BiasDirections, shape: "compat.Shape") -> None:
    """Raise `ConfigError` or `BankMismatchError` unless these directions fit the model and the configuration."""
    memory = config.memory
    if (memory.sinks, memory.positions) != ("once", "parallel"):
        raise ConfigError("vLLM reads memories with memory.sinks once and memory.positions parallel alone")
    if isinstance(memory.tokens_per_head, tuple):
        raise ConfigError("memory.tokens_per_head must be all or one number for vLLM, which has no masks for heads")
    ours, theirs = tuple(bias.directions.shape), (shape.layers, shape.kv_heads, shape.head_dim)
    if ours != theirs:
        raise BankMismatchError(
            f"{config.bank}: the bank is of a model with {ours[0]} layers, {ours[1]} KV heads and head_dim {ours[2]}; "
            f"vLLM serves one with {theirs[0]}, {theirs[1]} and {theirs[2]}"
        )
    if not bias.facts.weights and (config.recall.score_temperature is not None or memory.attention_weight != 1):
        raise ConfigError(
            f"{config.bank}: this model's queries are too different for weights (see `m3 calibrate-bias`); set "
            "recall.score_temperature to null, and recall.margin to leave out memories that match less; and "
            "memory.attention_weight to 1"
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
