"""Everything that a connector uses of vLLM and vLLM calls internal. `hosting` has what an engine here takes.

It is the interface of KV connectors and what their hooks are handed, which vLLM calls experimental. A new minor release
is tried here, with ``make test-vllm``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.tokenizers.registry import cached_tokenizer_from_config

from m3runtime.errors import ConfigError

MINOR = "0.32"
"""The release that this was written for and tried with."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

_BEAM = re.compile(r"-beam-\d+-[^-]*$")
"""In the names of requests that vLLM's server makes of one by beam search."""

# Families whose keys are rotated in halves, by one set of frequencies in all layers, and read in full by each of them.
# `tests/vllm/test_families.py` tries each.
_FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "olmo2", "granite"}


class ConnectorBase(KVConnectorBase_V1):  # type: ignore[misc]
    """The base class of connectors."""


class MetadataBase(KVConnectorMetadata):  # type: ignore[misc]
    """The base class of what a connector tells its workers in a step."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of the model that vLLM serves, and of its cache."""

    layers: int
    kv_heads: int
    """Of the whole model, whatever the tensor parallel size."""
    head_dim: int
    dtype: torch.dtype
    block: int
    """Tokens of a block."""
    length: int
    """Most tokens of prompt and answer."""
    workers: int
    together: bool
    """Does the one worker live in the scheduler's process?"""
    family: str


def check_release() -> None:
    """Raise `ConfigError` for another minor release than `MINOR`."""
    if not str(vllm.__version__).startswith(f"{MINOR}."):
        raise ConfigError(f"vLLM {vllm.__version__} is installed, and memories are read by {MINOR} alone; install that")


def is_scheduler(role: Any) -> bool:
    """Is it the scheduler's half of a connector?"""
    return bool(role == KVConnectorRole.SCHEDULER)


def options(vllm_config: Any) -> Mapping[str, Any]:
    """The ``kv_connector_extra_config``."""
    return dict(vllm_config.kv_transfer_config.kv_connector_extra_config)


def engine_id(vllm_config: Any) -> str:
    """The id of the engine, which scheduler, workers and HTTP servers have in common."""
    return str(vllm_config.kv_transfer_config.engine_id)


def shape_of(vllm_config: Any) -> Shape:
    """Read it off the configuration. Raises `ConfigError` for what cannot be served with memories."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        raise ConfigError("speculative decoding: its drafter cannot read memories; start vLLM without it")
    if vllm_config.scheduler_config.async_scheduling:
        raise ConfigError("memories are refreshed between two steps; start vLLM with --no-async-scheduling")
    if parallel.pipeline_parallel_size > 1 or parallel.data_parallel_size > 1:
        raise ConfigError("memories are not tried with pipeline or data parallelism; use tensor parallelism")
    family = str(model.hf_text_config.model_type)
    if family not in _FAMILIES:
        raise ConfigError(f"models of type {family} are not tried with vLLM; {', '.join(sorted(_FAMILIES))} are")
    if getattr(model.hf_text_config, "sliding_window", None) and getattr(model.hf_text_config, "use_sliding_window", 1):
        raise ConfigError(f"this model of type {family} has a sliding window, which would hide the memories")
    return Shape(
        layers=model.get_total_num_hidden_layers(),
        kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.get_head_size(),
        dtype=model.dtype,
        block=vllm_config.cache_config.block_size,
        length=model.max_model_len,
        workers=parallel.world_size,
        together=parallel.distributed_executor_backend == "uni",
        family=family,
    )


def model_path(vllm_config: Any) -> str:
    """The folder or name of the model."""
    return str(vllm_config.model_config.model)


def text_config(vllm_config: Any) -> Any:
    """The model's configuration, of the transformers library."""
    return vllm_config.model_config.hf_text_config


def tokenizer_of(vllm_config: Any) -> Any:
    """The tokenizer, as the transformers library has it."""
    return cached_tokenizer_from_config(vllm_config.model_config)


def turn(vllm_config: Any, by: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines that rotate a key on by a number of positions, float32 ``[rotated // 2]`` each."""
    model = vllm_config.model_config
    with set_current_vllm_config(vllm_config):
        rope = get_rope(
            model.get_head_size(),
            max_position=model.hf_text_config.max_position_embeddings,
            rope_parameters=getattr(model.hf_text_config, "rope_parameters", None),
            dtype=torch.float32,
        )
        cos, sin = rope._compute_cos_sin_cache()[abs(by)].float().chunk(2)
    scale = (cos.square() + sin.square()).sqrt()  # YaRN's, which is in the keys already
    return cos / scale, (sin if by >= 0 else -sin) / scale


# -- requests, as the scheduler knows them ----------------------------------------------------------------------


def prompt_ids(request: Any) -> Sequence[int] | None:
    """The tokens of a prompt; None for one of embeddings."""
    ids: Sequence[int] | None = request.prompt_token_ids
    return ids


def answer_ids(request: Any) -> Sequence[int]:
    """The tokens of the answer so far, a view that grows."""
    return request.output_token_ids  # type: ignore[no-any-return]


def params_of(request: Any) -> Mapping[str, Any]:
    """The request's ``kv_transfer_params``."""
    params = request.kv_transfer_params
    return params if isinstance(params, Mapping) else {}


def unserved(request: Any) -> str | None:
    """What of a request cannot be served with memories, by name."""
    if request.pooling_params is not None:
        return "pooling: memories are read by generating requests alone"
    if request.lora_request is not None:
        return "LoRA: memories were computed by the model without it"
    if _BEAM.search(request.request_id):
        return "beam search: vLLM does not hand on what its request says of memories"
    if request.sampling_params.prompt_logprobs is not None or request.skip_reading_prefix_cache:
        return "prompt_logprobs (and echo with logprobs): the prompt begins with memories, which have no tokens"
    return None


def salt(request: Any, text: str) -> None:
    """Keep a request's blocks apart from those of requests with other salts, beside what its client says."""
    request.cache_salt = f"{request.cache_salt or ''}|m3:{text}"
    request.block_hashes.clear()
    request.update_block_hashes()


def scheduled(scheduler_output: Any) -> Mapping[str, int]:
    """The requests of a step, and how many tokens of each are read."""
    return scheduler_output.num_scheduled_tokens  # type: ignore[no-any-return]


def blocks_of(scheduler_output: Any, request_id: str) -> list[int]:
    """The blocks of a scheduled request, in order."""
    found = scheduler_output.kv_connector_block_state.get_block_ids(request_id)
    return list(found[0]) if found else []


def load_first(scheduler_output: Any) -> None:
    """Let the workers load before the step's forward pass, and not after it."""
    scheduler_output.has_sync_kv_loads = True


# -- attention layers, as a worker knows them -------------------------------------------------------------------


def layers(forward_context: Any) -> Iterator[tuple[int, Any]]:
    """The attention layers, with their numbers."""
    for name, layer in forward_context.no_compile_layers.items():
        if hasattr(layer, "kv_cache") and (number := _LAYER.search(name)) is not None:
            yield int(number[1]), layer


def local_heads(layer: Any, kv_heads: int) -> slice:
    """The KV heads that this worker has of a layer."""
    own: int = layer.num_kv_heads
    copies = max(
        1, own * get_tensor_model_parallel_world_size() // kv_heads
    )  # with more workers than KV heads several have the same
    start = get_tensor_model_parallel_rank() // copies * own
    return slice(start, start + own)


def put(layer: Any, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write keys and values, ``[n, local KV heads, head_dim]``, into slots, ``int64[n]``, of a layer's cache."""
    layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)
