"""The adapter for causal language models of the transformers library.

Any architecture whose layers keep plain rotary keys and values works, if it asks the library for its masks and hands
its keyword arguments down to attention. `tests/model/test_architectures.py` tries all that the library has.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from m3model.attention.arrangement import Arrangement
from m3model.attention.implementation import prepare
from m3model.attention.layout import AttentionLayout
from m3model.attention.selection import attention_modules, select
from m3model.engine.baseline import TransformersBaseline
from m3model.engine.cutting import cut
from m3model.engine.encoding import encode_dense, encode_scored, reference_ids
from m3model.engine.generation import Generation
from m3model.engine.importance import importance
from m3model.engine.prompts import chat, render
from m3model.engine.reading import Row
from m3model.engine.scoring import Scoring
from m3model.engine.session import Session, Sink, make_sink
from m3model.engine.tokens import PromptTokens, stop_tokens
from m3model.loading.fingerprint import ModelIdentity, tokenizer_fingerprint
from m3model.loading.models import configuration_of, load
from m3model.loading.sizing import shape_of
from m3model.loading.spec import carried
from m3runtime.adapters.answers import Answer, Form, OnText, Prompt, Score
from m3runtime.adapters.base import Adapter
from m3runtime.bank.manifest import Manifest
from m3runtime.config.schema import GenerateConfig, MemoryConfig, ModelConfig
from m3runtime.errors import BankMismatchError, InputError
from m3runtime.memory.shape import ModelShape, memory_spec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.stream import Stream


class TransformersAdapter(Adapter):
    """A causal language model and its tokenizer. `count_tokens` may be called from any thread, the rest from one."""

    def __init__(self, model: Any, tokenizer: Any, memory: MemoryConfig, name: str) -> None:
        """Switch ``model`` to the attention of `m3model.attention`: only a `Session` can run it from now on."""
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.memory = memory = carried(model.config, memory)
        self.layout = AttentionLayout.of(model)
        self.tokens = PromptTokens(tokenizer, memory)
        self.sink, self.sink_ids = self.tokens.sink, self.tokens.sink_ids
        self.spec = memory_spec(
            memory,
            layers=self.layout.layers,
            kv_heads=self.layout.kv_heads,
            head_dim=self.layout.head_dim,
            dtype=str(self.layout.dtype).removeprefix("torch."),
        )
        if not self.spec.dense:
            attention_modules(model, self.spec.layers)  # or the mistake would show only while a bank is written
        self.identity = ModelIdentity.of(model)
        self.model_fingerprint, self.model_settings = self.identity.fingerprint, self.identity.settings
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        self.stop_tokens = stop_tokens(model, tokenizer)
        prepare(model)
        self._sink: Sink = make_sink(model, self.sink_ids)
        self._arrange: Arrangement | None = None
        if (memory.sinks, memory.positions) != ("once", "parallel"):
            self._arrange = Arrangement(model, memory, self.spec.layers, self._sink, self.spec.reference_tokens)

    @classmethod
    def open(cls, model: ModelConfig, memory: MemoryConfig, device: torch.device) -> Self:
        """Load the model from a folder, a hub name or a GGUF file; see `Adapter.open`."""
        loaded, tokenizer = load(model.path, model.dtype, device)
        return cls(loaded, tokenizer, memory, model.path)

    @classmethod
    def shape(cls, model: ModelConfig) -> ModelShape:
        """The model's shape, from its configuration alone; see `Adapter.shape`."""
        return shape_of(model)

    @classmethod
    def carried(cls, model: ModelConfig, memory: MemoryConfig) -> MemoryConfig:
        """The memory settings in force, from the model's configuration alone; see `Adapter.carried`."""
        return carried(configuration_of(model.path), memory)

    @property
    def device(self) -> torch.device:
        """The device of the model; see `Adapter.device`."""
        return self.layout.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's keys; see `Adapter.dtype`."""
        return self.layout.dtype

    @property
    def offset(self) -> int:
        """Position of the first context token; all memories share the positions between the sink and it."""
        return len(self.sink_ids) + self.spec.reference_tokens

    def check(self, manifest: Manifest, where: Path) -> None:
        """Raise `BankMismatchError` that names the difference, unless this model wrote the bank at ``where``.

        Banks of releases that recorded no settings of the model are known by its weights.
        """
        differences = self.identity.differences(manifest.model, manifest.model_settings)
        if differences:
            raise BankMismatchError(
                f"{where}: the bank was written with other settings of the model: {', '.join(differences)}; "
                "set them as they were, or write the bank anew"
            )
        if differences is not None:
            manifest = replace(manifest, model=self.model_fingerprint)
        super().check(manifest, where)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, in which markers of special tokens are text."""
        return self.tokens.ids(text)

    def count_tokens(self, text: str) -> int:
        """The number of tokens of a reference; see `Adapter.count_tokens`."""
        return len(self.ids(text))

    def cut(self, text: str, tokens: int) -> list[str]:
        """A text in pieces of equally many tokens; see `Adapter.cut`."""
        return cut(self.tokens.literal, text, tokens)

    @torch.inference_mode()
    def encode(self, references: Sequence[str]) -> MemoryTensors:
        """The memories of one batch of references, of as many tokens as ``memory.tokens_per_head`` says.

        See `Adapter.encode`.
        """
        if self.spec.dense:
            return encode_dense(self.model, self._reference_ids(references), self._sink, self.spec)
        memories, scores = self.encode_scored(references)
        return select(memories, scores, self.spec.tokens)

    def encode_scored(self, references: Sequence[str]) -> tuple[MemoryTensors, torch.Tensor]:
        """Memories of all tokens and the scores to select by; see `m3model.engine.encoding.encode_scored`.

        Raises `InputError` as `Adapter.encode` does.
        """
        return encode_scored(self.model, self._reference_ids(references), self._sink, self.spec)

    def importance(self, references: Sequence[str]) -> torch.Tensor:
        """The cost of errors in keys and values; see `Adapter.importance` and `m3model.engine.importance`."""
        return importance(references, self.encode, self.ids, self.session)

    def baseline(self) -> TransformersBaseline:
        """The model as its own library runs it; see `m3runtime.lab.bench.comparison.Comparable`."""
        endless = copy.copy(self)
        endless.stop_tokens = frozenset()
        return TransformersBaseline(self.model, lambda prompts: self._prompt_ids(prompts, None), endless)

    def session(self, batch: int, *, memories: bool = True, context: int = 256) -> Session:
        """A batch to feed token by token: sink, room for memories, and the context after them."""
        if not memories:
            return Session(self.model, batch=batch, context=context)
        return Session(
            self.model,
            batch=batch,
            memory_layers=self.spec.layers,
            sink=self._sink,
            offset=self.offset,
            context=context,
            temperature=self.memory.attention_temperature,
            arrange=self._arrange,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        streams: Sequence[Stream] | None,
        settings: GenerateConfig,
        on_text: OnText | None = None,
    ) -> list[Answer]:
        """Continue each prompt; see `Adapter.generate`."""
        began = time.perf_counter()
        return self._generation(prompts, streams, settings, on_text).run(began) if prompts else []

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], streams: Sequence[Stream] | None
    ) -> list[Score]:
        """The likelihood of each continuation after its prompt; see `Adapter.score`."""
        if len(continuations) != len(prompts):
            raise InputError(f"{len(prompts)} prompts, but {len(continuations)} continuations")
        if not prompts:
            return []
        rows = [
            Row(prompt, ids, self.ids(text))
            for prompt, ids, text in zip(prompts, self._prompt_ids(prompts, streams), continuations, strict=True)
        ]
        if any(not row.tokens for row in rows):
            raise InputError("a continuation needs at least one token")
        room = max(len(row.ids) for row in rows) + max(len(row.tokens) for row in rows)
        session = self.session(len(rows), memories=streams is not None, context=room)
        return Scoring(session, self.tokenizer, rows, streams).run()

    def examine(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[str | None],
        streams: Sequence[Stream] | None,
        settings: GenerateConfig,
    ) -> list[tuple[Answer, Score | None]]:
        """`generate` and `score` at once: the prompts are read once. See `Adapter.examine`."""
        if not prompts:
            return []
        began = time.perf_counter()
        generation = self._generation(prompts, streams, settings, None)
        after, end = generation.read_prompts(), generation.session.mark()
        rows = [
            Row(row.prompt, row.ids, self.ids(text or ""), list(row.chunks))
            for row, text in zip(generation.rows, continuations, strict=True)
        ]
        scores = Scoring(generation.session, self.tokenizer, rows, streams).run(after)
        generation.session.rewind(end)
        if streams is not None:
            generation.attend()
        answers = generation.run(began, after)
        return [
            (answer, None if text is None else score)
            for answer, text, score in zip(answers, continuations, scores, strict=True)
        ]

    def with_memory(self, memory: MemoryConfig) -> Self:
        """An adapter of the same loaded model with other memory settings; see `Adapter.with_memory`."""
        return type(self)(self.model, self.tokenizer, memory, self.name)

    def render(self, question: str, form: Form, texts: Sequence[str] | None = None) -> Prompt:
        """The prompt that asks a question; see `Adapter.render` and `m3model.engine.prompts.render`."""
        return render(self.tokenizer, question, form, sink=self.memory.sink, texts=texts)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """The prompt of a conversation, in the model's chat template; see `Adapter.chat`."""
        return chat(self.tokenizer, messages)

    def close(self) -> None:
        """Drop the model; see `Adapter.close`."""
        del self.model

    def _generation(
        self,
        prompts: Sequence[Prompt],
        streams: Sequence[Stream] | None,
        settings: GenerateConfig,
        on_text: OnText | None,
    ) -> Generation:
        ids = self._prompt_ids(prompts, streams)
        room = max(len(row) for row in ids) + settings.max_new_tokens
        session = self.session(len(prompts), memories=streams is not None, context=room)
        return Generation(session, self.tokenizer, prompts, ids, streams, settings, self.stop_tokens, on_text)

    def _reference_ids(self, references: Sequence[str]) -> Sequence[list[int]]:
        return reference_ids(references, [self.ids(text) for text in references], self.spec.reference_tokens)

    def _prompt_ids(self, prompts: Sequence[Prompt], streams: Sequence[Stream] | None) -> list[list[int]]:
        """The tokens of prompts, after the sink where they have streams."""
        if streams is not None and len(streams) != len(prompts):
            raise InputError(f"{len(prompts)} prompts, but {len(streams)} streams")
        ids = [self.tokens.of_prompt(prompt, sink=streams is not None) for prompt in prompts]
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = None if positions is None else positions - (0 if streams is None else self.offset)
        if room is not None and (longest := max(map(len, ids), default=0)) > room:
            raise InputError(
                f"the prompt has {longest} tokens, and of the model's {positions} positions {room} are left for a "
                "prompt; shorten it"
            )
        return ids
