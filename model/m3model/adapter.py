"""The adapter for causal language models of the transformers library.

Any architecture whose layers keep plain rotary keys and values works, if it asks the library for its masks and hands
its keyword arguments down to attention. `tests/model/test_architectures.py` tries all that the library has.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from m3model.attention.arrangement import Arrangement
from m3model.attention.implementation import prepare
from m3model.attention.layout import AttentionLayout
from m3model.attention.selection import attention_modules, select
from m3model.bias.calibration import Calibration
from m3model.bias.texts import served_ids
from m3model.bias.verdict import judged
from m3model.engine.baseline import TransformersBaseline
from m3model.engine.buffers import RowBuffers
from m3model.engine.cutting import cut
from m3model.engine.encoding import encode_dense, encode_repeated, encode_scored, reference_ids
from m3model.engine.engine import MemoryEngine
from m3model.engine.fusing import fuse
from m3model.engine.importance import importance
from m3model.engine.job import Words
from m3model.engine.packing import pack as pack_weights
from m3model.engine.prompts import chat, render
from m3model.engine.scoring import Row, Scoring, decode
from m3model.engine.session import Session, Sink, make_sink
from m3model.engine.tokens import PromptTokens, stop_tokens
from m3model.loading.fingerprint import ModelIdentity, tokenizer_fingerprint
from m3model.loading.models import configuration_of, load
from m3model.loading.sizing import shape_of
from m3model.loading.spec import carried
from m3runtime.adapters.answers import Form, Prompt, Score
from m3runtime.adapters.base import Adapter, check_streams
from m3runtime.adapters.engine import Engine
from m3runtime.bank.bias import BiasDirections, BiasFacts
from m3runtime.bank.manifest import Manifest
from m3runtime.config.schema import MemoryConfig, ModelConfig
from m3runtime.errors import BankMismatchError, ConfigError, InputError, PromptTooLongError
from m3runtime.memory.shape import ModelShape, memory_spec
from m3runtime.memory.tensors import MemoryTensors, budgets_of
from m3runtime.storage.defaults import default_room
from m3runtime.stream import Stream


class TransformersAdapter(Adapter):
    """A causal language model and its tokenizer. `count_tokens` may be called from any thread, the rest from one."""

    grounds = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        memory: MemoryConfig,
        name: str,
        *,
        rows: int = ModelConfig.model_fields["rows"].default,
        room: int | None = None,
        compile: bool = False,
        pack: bool = True,
    ) -> None:
        """Switch ``model`` to the attention of `m3model.attention`: only its engine and sessions can run it now.

        ``rows``, ``room``, ``compile`` and ``pack`` are settings of `m3runtime.config.schema.ModelConfig`.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.rows, self.room = rows, room
        self._engine: MemoryEngine | None = None
        self._opening = threading.Lock()  # held while the engine is made
        self._busy = threading.Lock()  # held while the model computes for the engine, or encodes
        self.memory = memory = carried(model.config, memory)
        self.layout = AttentionLayout.of(model)
        if isinstance(memory.tokens_per_head, tuple) and not (
            self.layout.alike and not self.layout.shares and not self.layout.again
        ):
            raise ConfigError(
                "memory.tokens_per_head: heads can have budgets of their own where layers are alike, run once, and "
                "have keys of their own; this model's do not"
            )
        self.tokens = PromptTokens(tokenizer, memory)
        self.sink, self.sink_ids = self.tokens.sink, self.tokens.sink_ids
        self.spec = memory_spec(
            memory,
            layers=self.layout.layers,
            kv_heads=self.layout.kv_heads,
            head_dim=self.layout.head_dim,
            dtype=str(self.layout.dtype).removeprefix("torch."),
            heads=self.layout.pieces,
        )
        if not self.spec.dense and (memory.select_by == "attention" or self.layout.again):
            attention_modules(model, self.spec.layers)  # or the mistake would show only while a bank is written
        elif not self.spec.dense and (self.layout.shares or not self.layout.alike):
            raise ConfigError("memory.select_by must be attention: layers of this model are not alike, or share keys")
        self.identity = ModelIdentity.of(model)
        self.model_fingerprint, self.model_settings = self.identity.fingerprint, self.identity.settings
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        self.stop_tokens = stop_tokens(model, tokenizer)
        prepare(model)
        if compile:
            fuse(model)
        elif pack:
            pack_weights(model)
        self._sink: Sink = make_sink(model, self.sink_ids)
        self._arrange: Arrangement | None = None
        self._budgets = budgets_of(self.spec) if self.spec.budgets else None
        # A sink that is read before each memory is of all heads.
        before = len(self.sink_ids) if memory.sinks == "each" else 0
        self._columns = None if self._budgets is None else self._budgets + before
        if (memory.sinks, memory.positions) != ("once", "parallel"):
            self._arrange = Arrangement(model, self.layout, memory, self.spec.layers, self._sink)

    @classmethod
    def open(cls, model: ModelConfig, memory: MemoryConfig, device: torch.device) -> Self:
        """Load the model from a folder, a hub name or a GGUF file; see `Adapter.open`."""
        loaded, tokenizer = load(model.path, model.dtype, device)
        settings = model.model_dump(include={"rows", "compile", "pack"})
        return cls(loaded, tokenizer, memory, model.path, room=model.room, **settings)

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
            with self._busy:
                return encode_dense(self.model, self._reference_ids(references), self._sink, self.spec)
        memories, scores = self.encode_scored(references)
        heads = None if self.layout.alike else self.layout.heads_of_pieces(self.spec.layers)
        return select(memories, scores, self.spec.tokens, heads, self._budgets)

    def encode_scored(self, references: Sequence[str]) -> tuple[MemoryTensors, torch.Tensor]:
        """Memories of all tokens and the scores to select by, as ``memory.select_by`` says.

        See `m3model.engine.encoding.encode_scored`. Raises `InputError` as `Adapter.encode` does.
        """
        ids = self._reference_ids(references)
        with self._busy:  # meanwhile every forward pass of these layers is looked at
            if self.memory.select_by == "repeat":
                return encode_repeated(self.model, ids, self._sink, self.spec)
            return encode_scored(self.model, ids, self._sink, self.spec)

    def importance(self, references: Sequence[str]) -> torch.Tensor:
        """The cost of errors in keys and values; see `Adapter.importance` and `m3model.engine.importance`."""
        return importance(references, self.encode, self.ids, self.session, self._budgets)

    @property
    def most_positions(self) -> int | None:
        """The tokens that a context after the memories may have; see `m3runtime.adapters.bias.BiasCalibrating`."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        known = [one for one in (positions, self.layout.positions) if one is not None]
        return min(known) - self.offset if known else None

    def calibrate_bias(
        self, references: Sequence[str], length: int, progress: Callable[[int, int], None]
    ) -> BiasDirections:
        """Directions that all queries meet alike; see `m3runtime.adapters.bias.BiasCalibrating`."""
        if not self.layout.alike or self.layout.shares:
            raise ConfigError("model.path: bias directions need heads of one size that are alike in all layers")
        if self.most_positions is not None and length > self.most_positions:
            raise InputError(f"--length {length}: after the memories this model has {self.most_positions} positions")
        calibration = Calibration(self.layout.layers, self.session, self.encode, partial(served_ids, self.tokens))
        facts = BiasFacts(
            model=self.model_fingerprint,
            model_name=self.name,
            layers=self.spec.layers,
            sink_ids=tuple(self.sink_ids),
            dtype=self.spec.dtype,
            offset=self.offset,
            length=length,
        )
        return judged(calibration.run(references, length, progress), facts, self._sink)

    def baseline(self) -> TransformersBaseline:
        """The model as its own library runs it; see `m3runtime.lab.bench.comparison.Comparable`."""
        endless = self.with_memory(self.memory)
        endless.stop_tokens = frozenset()
        return TransformersBaseline(self.model, lambda prompts: self._prompt_ids(prompts, sink=False), endless)

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
            log_weight=math.log(self.memory.attention_weight),
            arrange=self._arrange,
            budgets=self._columns,
        )

    @property
    def engine(self) -> Engine:
        """The engine that decodes with this model; see `Adapter.engine`."""
        with self._opening:
            if self._engine is None:
                self._engine = self._open_engine()
            return self._engine

    def _open_engine(self) -> MemoryEngine:
        reading = self.memory.attention_temperature, math.log(self.memory.attention_weight)
        buffers = RowBuffers(self.layout, self.spec.layers, self._sink, *reading, budgets=self._columns)
        words = Words(
            lambda prompt, sink: self._prompt_ids([prompt], sink=sink)[0],
            lambda tokens: decode(self.tokenizer, tokens),
            lambda: self.stop_tokens,
        )
        return MemoryEngine(
            self.model,
            buffers,
            words,
            offset=self.offset,
            arrange=self._arrange,
            rows=self.rows,
            room=self.room or default_room(self.device),
            busy=self._busy,
        )

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], streams: Sequence[Stream] | None
    ) -> list[Score]:
        """The likelihood of each continuation after its prompt; see `Adapter.score`."""
        if len(continuations) != len(prompts):
            raise InputError(f"{len(prompts)} prompts, but {len(continuations)} continuations")
        check_streams(prompts, streams)
        if not prompts:
            return []
        rows = [
            Row(prompt, ids, self.ids(text))
            for prompt, ids, text in zip(
                prompts, self._prompt_ids(prompts, sink=streams is not None), continuations, strict=True
            )
        ]
        if any(not row.tokens for row in rows):
            raise InputError("a continuation needs at least one token")
        room = max(len(row.ids) for row in rows) + max(len(row.tokens) for row in rows)
        session = self.session(len(rows), memories=streams is not None, context=room)
        return Scoring(session, self.tokenizer, rows, streams).run()

    def with_memory(self, memory: MemoryConfig) -> Self:
        """An adapter of the same loaded model with other memory settings; see `Adapter.with_memory`."""
        settings: dict[str, Any] = {"rows": self.rows, "room": self.room, "pack": False}  # its layers are as they are
        other = type(self)(self.model, self.tokenizer, memory, self.name, **settings)
        other._busy = self._busy
        return other

    def render(self, question: str, form: Form, texts: Sequence[str] | None = None) -> Prompt:
        """The prompt that asks a question; see `Adapter.render` and `m3model.engine.prompts.render`."""
        return render(self.tokenizer, question, form, sink=self.memory.sink, texts=texts)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """The prompt of a conversation, in the model's chat template; see `Adapter.chat`."""
        return chat(self.tokenizer, messages)

    def count_prompt(self, prompt: Prompt, *, memories: bool) -> int:
        """The number of tokens of a prompt; see `Adapter.count_prompt`."""
        return len(self._prompt_ids([prompt], sink=memories)[0])

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens; see `Adapter.text_of`."""
        return decode(self.tokenizer, tokens)

    def close(self) -> None:
        """Close the engine and drop the model; see `Adapter.close`."""
        with self._opening:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
        del self.model

    def _reference_ids(self, references: Sequence[str]) -> Sequence[list[int]]:
        return reference_ids(references, [self.ids(text) for text in references], self.spec.reference_tokens)

    def _prompt_ids(self, prompts: Sequence[Prompt], *, sink: bool) -> list[list[int]]:
        """The tokens of prompts, after the sink or without. Raises `PromptTooLongError` for too many."""
        ids = [self.tokens.of_prompt(prompt, sink=sink) for prompt in prompts]
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = None if positions is None else positions - (self.offset if sink else 0)
        if room is not None and (longest := max(map(len, ids), default=0)) > room:
            raise PromptTooLongError(
                f"the prompt has {longest} tokens, and of the model's {positions} positions {room} are left for a "
                "prompt; shorten it"
            )
        return ids
