"""Fingerprints that tell models and tokenizers apart, and the settings that tell one model's variants apart."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from m3runtime.errors import ConfigError
from m3runtime.memory.spec import canonical_json, fingerprint

SAMPLE = 65_536
"""Elements of each parameter that its fingerprint reads: training changes them all, and reading all takes long."""

_SHAPE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "vocab_size",
)

_NO_MATTER = re.compile(
    # names, versions and types that a model is stored or computed in
    r"_.*|architectures|auto_map|transformers_version|.*dtype|attn_implementation|experts_implementation"
    r"|quantization_config"  # packed weights have fingerprints of their own
    # results that are returned, and how they are called
    r"|use_cache|return_dict|output_.*|id2label|label2id|problem_type|is_encoder_decoder|is_decoder"
    # training
    r"|initializer.*|.*dropout.*|.*pdrop|.*aux_loss_coef|.*jitter.*|pretraining_tp|chunk_size_feed_forward"
    # generation, and the head after the last layer
    r"|(bos|eos|pad|unk|sep|cls|mask|decoder_start)_token_id|tie_word_embeddings"
)
"""Settings of a text configuration that no key or value depends on."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The weights of a model, and the settings by which it computes keys and values from them."""

    weights: str
    """Thirty-two hex digits over the architecture's shape and a sample of every parameter.

    Before settings were recorded this was a model's whole fingerprint.
    """
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, model: Any) -> "ModelIdentity":
        """Read it off a loaded causal language model of the transformers library."""
        config = model.config.get_text_config()
        return cls(_weights_fingerprint(config, dict(model.named_parameters())), _settings(config))

    @classmethod
    def of_checkpoint(cls, folder: Path, config: Any) -> Self:
        """Read it off the safetensors files of a model that the transformers library would load as it is.

        ``config`` is its text configuration. Raises `ConfigError` if there are no such files.
        """
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"{folder} has no safetensors files, so it cannot be told what model it is")
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
            where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - it is no mapping
            if getattr(config, "tie_word_embeddings", False):
                where.pop("lm_head.weight", None)
            parameters = _Lazily(where)
            return cls(_weights_fingerprint(config, parameters), _settings(config))

    @property
    def fingerprint(self) -> str:
        """Thirty-two hex digits over weights and settings."""
        return fingerprint([self.weights, self.settings])

    def differences(self, fingerprint: str, settings: Mapping[str, Any]) -> list[str] | None:
        """The settings in which the model of this fingerprint differs, as text; None if it has other weights.

        ``settings`` are those recorded with the fingerprint; none were in former releases, and nothing is told of
        them then. A setting that only one side has came or went with a version of the transformers library, which
        computes the same without it.
        """
        if fingerprint == self.weights:
            return []
        if fingerprint != ModelIdentity(self.weights, settings).fingerprint:
            return None
        common = sorted(settings.keys() & self.settings.keys())
        return [
            f"{name} {settings[name]} against {self.settings[name]}"
            for name in common
            if settings[name] != self.settings[name]
        ]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Thirty-two hex digits over what turns text into token ids."""
    pieces = sorted(tokenizer.get_vocab().items())
    probe = "Explicit memory, 64 tokens: naïve — 12,345 ½ \t\n  x+=1; Ünïcödé"
    ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
    return fingerprint({"vocabulary": pieces, "probe": ids, "special": sorted(tokenizer.all_special_ids)})


class _Lazily(Mapping[str, Tensor]):
    """The tensors of open safetensors files, each read when it is asked for."""

    def __init__(self, where: Mapping[str, Any]) -> None:
        self._where = where

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _weights_fingerprint(config: Any, parameters: Mapping[str, Tensor]) -> str:
    """Parameters are read as bfloat16: a checkpoint loaded as float32 and as bfloat16 is the same model."""
    stated = config.to_dict()
    state = xxhash.xxh3_128(canonical_json({key: stated.get(key) for key in _SHAPE}).encode())
    for name in sorted(parameters):
        parameter = parameters[name]
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)].to(torch.bfloat16).cpu().contiguous()
        state.update(f"{name}{tuple(parameter.shape)}".encode())
        state.update(sample.view(torch.int16).numpy().data)
    return state.hexdigest()


def _settings(config: Any) -> dict[str, Any]:
    """All settings of a text configuration but those that do not matter, as JSON has them."""
    stated = json.loads(json.dumps(config.to_dict(), default=str))
    if stated.get("use_bidirectional_attention") == "vision":  # of pictures, which no memory is made of
        stated["use_bidirectional_attention"] = None
    return {name: _rounded(value) for name, value in stated.items() if not _NO_MATTER.fullmatch(name)}


def _rounded(value: Any) -> Any:
    """Numbers to six digits: GGUF files store them as float32, ``config.json`` as text."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value
