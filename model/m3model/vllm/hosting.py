"""An engine of vLLM in this process: like `compat`, only what vLLM calls internal."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.config import KVTransferConfig
from vllm.sampling_params import RequestOutputKind
from vllm.v1.executor import Executor

from m3model.vllm.compat import check_release, tokenizer_of
from m3runtime.errors import ConfigError


def open_engine(model: str, options: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
    """An engine, of vLLM's ``EngineArgs``. Raises `ConfigError` for options that it does not have."""
    check_release()
    connector = KVTransferConfig(
        kv_connector="MemoryConnector",
        kv_connector_module_path="m3model.vllm.connector",
        kv_role="kv_both",
        kv_connector_extra_config=dict(extra),
    )
    given = {"model": model, "async_scheduling": False, "disable_log_stats": True, **options}
    try:
        arguments = EngineArgs(**given, kv_transfer_config=connector)
    except TypeError as error:
        raise ConfigError(f"vLLM: {error}") from error
    config = arguments.create_engine_config()
    # On a CPU vLLM looks at what every module names, and this one, of numba's, has an object that it cannot look at.
    module = "llvmlite.binding.ffi"
    hidden = sys.modules.pop(module, None)
    try:
        return LLMEngine(config, Executor.get_class(config), log_stats=False)
    finally:
        if hidden is not None:
            sys.modules[module] = hidden


def config_of(engine: Any) -> Any:
    """The configuration of an engine."""
    return engine.vllm_config


def connector_of(engine: Any) -> Any:
    """The scheduler's half of the connector of an engine."""
    return engine.engine_core.engine_core.scheduler.connector


def submit(engine: Any, ids: Sequence[int], sampling: Mapping[str, Any]) -> str:
    """Queue a request; returns the name of its outputs, which have the tokens since the last one."""
    params = SamplingParams(**sampling, output_kind=RequestOutputKind.DELTA)
    name = uuid4().hex
    engine.add_request(name, {"prompt_token_ids": list(ids)}, params)
    return name


def abort(engine: Any, name: str) -> None:
    """Take a request out, if it is still there."""
    engine.abort_request([name])


def shut_down(engine: Any) -> None:
    """End an engine."""
    engine.engine_core.shutdown()


def stop_tokens(vllm_config: Any) -> frozenset[int]:
    """The tokens that end an answer: those of the generation configuration, and the tokenizer's own."""
    model = vllm_config.model_config
    found = [model.try_get_generation_config().get("eos_token_id"), tokenizer_of(vllm_config).eos_token_id]
    return frozenset(id for one in found for id in ([one] if isinstance(one, int) else one or []))


def vocabulary(vllm_config: Any) -> int:
    """Entries of the model's last layer."""
    return int(vllm_config.model_config.get_vocab_size())
