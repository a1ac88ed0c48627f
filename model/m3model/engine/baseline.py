"""The model as the transformers library's own `generate` runs it, which benchmarks compare with."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils.import_utils import is_flash_attn_2_available

from m3model.engine.packing import unpacked
from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.base import Adapter


@dataclass(frozen=True, slots=True)
class PlainRun:
    """The continuations of a batch of prompts by the library alone."""

    tokens: tuple[tuple[int, ...], ...]
    """The tokens after each prompt, exactly as many as requested."""
    first_token_s: float
    """Seconds from the call to the first tokens."""
    seconds: float
    """Seconds of the whole call."""


class TransformersBaseline:
    """A `m3runtime.lab.bench.comparison.Baseline`. Between two calls the model has its former attention implementation.

    A variant is an attention implementation and a cache: ``dynamic``, the library's default, which grows by copying, or
    ``static``, allocated for ``room`` tokens; with that the library compiles decoding, where it compiles at all (CUDA).
    """

    def __init__(
        self, model: Any, read: Callable[[Sequence[Prompt]], Sequence[Sequence[int]]], endless: Adapter
    ) -> None:
        """``read`` gives the tokens of prompts."""
        self.model = model
        self.variants = tuple(f"{attention}, {cache}" for attention in _attentions(model) for cache in _CACHES)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        # A step looks up one row of the embedding; it reads all of it where it is the head as well.
        looked_up = 0 if head is None or head.weight is embedding.weight else embedding.weight.nbytes
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters()) - looked_up
        self._read = read
        self._endless = endless

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], new_tokens: int, variant: str, room: int) -> PlainRun:
        """Continue prompts, padded on the left; see `m3runtime.lab.bench.comparison.Baseline`."""
        attention, _, cache = variant.partition(", ")
        with self._running_with(attention):
            began = time.perf_counter()
            rows = self._read(prompts)
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            clock = _Clock(self.model.device)
            fixed = {"cache_implementation": "static", "max_cache_len": room} if cache == "static" else {}
            written = self.model.generate(
                ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                logits_processor=LogitsProcessorList([clock]),
                generation_config=_configured(
                    do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, use_cache=True, **fixed
                ),
            )
            tokens = tuple(tuple(row) for row in written[:, width:].tolist())  # waits for an accelerator
            return PlainRun(tokens, clock.first - began, time.perf_counter() - began)

    def endless(self) -> Adapter:
        """An adapter whose answers have no end; see `m3runtime.lab.bench.comparison.Baseline`."""
        return self._endless

    @contextmanager
    def _running_with(self, attention: str) -> Iterator[None]:
        """The attention implementation, and no end: what a configuration leaves out is taken from the model's own."""
        before, own = self.model.config._attn_implementation, self.model.generation_config
        self.model.set_attn_implementation(attention)
        self.model.generation_config = _configured()
        try:
            with unpacked(self.model):
                yield
        finally:
            self.model.generation_config = own
            self.model.set_attn_implementation(before)


_CACHES = ("dynamic", "static")


def _configured(**settings: Any) -> Any:
    return GenerationConfig(**settings)


def _attentions(model: Any) -> list[str]:
    """The implementations that may run here."""
    found = ["sdpa", "eager"]
    if model.device.type == "cuda":
        found += ["flex_attention"] * bool(model._supports_flex_attn)
        half = model.dtype in (torch.float16, torch.bfloat16)
        found += ["flash_attention_2"] * bool(half and is_flash_attn_2_available())
    return found


class _Clock(LogitsProcessor):
    """Notes the time of the first logits, and changes none."""

    def __init__(self, device: torch.device) -> None:
        self.first = 0.0
        self._device = device

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - as it is called
        if not self.first:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # once: later steps need not wait
            self.first = time.perf_counter()
        return scores
