"""`MemoryConnector`: the KV connector that vLLM loads.

    --kv-transfer-config '{"kv_connector": "MemoryConnector", "kv_connector_module_path": "m3model.vllm.connector",
                           "kv_role": "kv_both", "kv_connector_extra_config": {"config": "m3.yaml"}}'

vLLM makes one in the scheduler and one in each worker. Both only hand on what they are called with.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from m3model.vllm import compat
from m3model.vllm.opening import on_cpu, open_reader
from m3model.vllm.reading import Load
from m3model.vllm.recalls import Recalls
from m3model.vllm.scheduling import SchedulerHalf
from m3model.vllm.settings import Settings, bias_of, check, check_weights, head_of, width_of
from m3model.vllm.slots import Slots
from m3model.vllm.telling import Telling, socket_of
from m3model.vllm.wish import Head
from m3model.vllm.words import Words
from m3model.vllm.worker import WorkerHalf
from m3runtime.bank.bias import BiasDirections
from m3runtime.errors import ConfigError
from m3runtime.runtime import Runtime


@dataclass
class Metadata(compat.MetadataBase):
    """What the scheduler tells the workers in a step."""

    loads: list[Load] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    """A block of each request that is refused."""


class MemoryConnector(compat.ConnectorBase):
    """See the module. Raises the errors of `settings` and of `Runtime.open` when the server starts."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        compat.check_release()
        self._vllm = vllm_config
        self._settings = Settings.of(compat.options(vllm_config))
        self.config = self._settings.load()
        self._shape = compat.shape_of(vllm_config)
        self._bias = bias_of(self.config.bank)
        check(self.config, self._bias, self._shape)
        self.head: Head = head_of(
            self._settings, self.config, self._bias, self._shape, compat.tokenizer_of(vllm_config)
        )
        self._runtime: Runtime | None = None
        self.scheduler: SchedulerHalf | None = None
        self._telling: Telling | None = None
        self._worker: WorkerHalf | None = None
        self._pool: Any = None
        self._step: Metadata | None = None
        if not compat.is_scheduler(role):
            if not self._shape.together:
                self._runtime = open_reader(self.config)
            self._worker = WorkerHalf(self._shape, self._make_slots, self._runtime)
        elif not self._settings.hosted:
            # On a GPU several workers decode memories, each its own; here they are only looked at.
            self._runtime = Runtime.open(self.config if self._shape.together else on_cpu(self.config), read_only=True)
            self._telling = Telling(socket_of(compat.engine_id(vllm_config)), self._facts(self._runtime))
            self.read(self._runtime)

    def _facts(self, runtime: Runtime) -> dict[str, Any]:
        """What a client has to know to build prompts, and that it speaks of the same bank."""
        head = {"sink": list(self.head.sink), "slots": self.head.slots, "placeholder": self.head.placeholder}
        return {**head, "bank": runtime.bank.manifest.stamp.bank, "chunk_tokens": self.config.recall.chunk_tokens}

    def read(self, runtime: Runtime) -> None:
        """Read the bank of this runtime, which stays the caller's to close. Raises `BankMismatchError`."""
        bank = runtime.bank
        BiasDirections.load(bank.path, bank.manifest)  # of this model and these layers?
        if self._settings.check_weights:
            check_weights(bank.manifest, compat.model_path(self._vllm), compat.text_config(self._vllm), bank.path)
        words = Words.of(compat.tokenizer_of(self._vllm))
        tell = None if self._telling is None else self._telling.tell
        self.scheduler = SchedulerHalf(self.head, Recalls(runtime, self._shape.dtype), self._shape, words, tell)

    def _make_slots(self, heads: slice, dtype: torch.dtype, device: torch.device) -> Slots:
        return Slots(
            self._bias,
            self.head.slots,
            compat.turn(self._vllm, self.head.slots - width_of(self._bias)),
            heads=heads,
            temperature=self.config.memory.attention_temperature,
            log_weight=math.log(self.config.memory.attention_weight),
            dtype=dtype,
            device=device,
            cache_bytes=self._settings.cache,
        )

    # -- the scheduler's hooks ----------------------------------------------------------------------------------

    def _half(self) -> SchedulerHalf:
        if self.scheduler is None:
            raise ConfigError("no bank is open yet")
        return self.scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """See vLLM."""
        self._pool = gpu_block_pool

    def on_new_request(self, request: Any) -> None:
        """See vLLM."""
        if self.scheduler is not None:
            self.scheduler.add(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See vLLM."""
        return (0 if self.scheduler is None else self.scheduler.matched(request, num_computed_tokens)), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:  # noqa: ARG002
        """See vLLM."""
        if self.scheduler is not None:
            self.scheduler.allocated(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Metadata:
        """See vLLM."""
        return Metadata() if self.scheduler is None else Metadata(*self.scheduler.plan(scheduler_output))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See vLLM."""
        if self.scheduler is None:
            return False, None
        if self.scheduler.is_private(request):  # nobody else has their salt: make room at once
            self._pool.evict_blocks(set(block_ids))
        return False, self.scheduler.finished(request)

    # -- a worker's hooks ---------------------------------------------------------------------------------------

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """See vLLM. Its base class is not told: it would call two hooks for each layer, and they have nothing to do."""
        self._step = connector_metadata

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        """See vLLM."""
        if self._worker is not None and self._step is not None:
            self._worker.load(self._step.loads, self._step.refused, forward_context)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """See vLLM."""
        return set() if self._worker is None else self._worker.failed()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: `start_load_kv` has written all layers."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def shutdown(self) -> None:
        """See vLLM."""
        with ExitStack() as closing:
            if self._runtime is not None:
                closing.callback(self._runtime.close)
            if self._telling is not None:
                closing.callback(self._telling.close)
            if self.scheduler is not None:
                closing.callback(self.scheduler.close)
