"""The adapter for causal language models of the transformers library.

Any architecture whose layers keep plain rotary keys and values, and hand their keyword arguments down to attention,
works: Llama, Qwen2, Qwen3, Mistral, Gemma 2 and 3, Phi-3 and OLMo2 are tested.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch

from m3model.attention.arrangement import Arrangement
from m3model.attention.layout import AttentionLayout
from m3model.attention.selection import attention_modules, observed, select
from m3model.attention.stopping import stopping_after
from m3model.engine.baseline import TransformersBaseline
from m3model.engine.cutting import cut
from m3model.engine.generation import Generation
from m3model.engine.importance import importance
from m3model.engine.prompts import chat, render, turn_head
from m3model.engine.reading import Row
from m3model.engine.scoring import Scoring
from m3model.engine.session import Session, Sink, make_sink, prepare
from m3model.loading.models import configuration_of, load, model_fingerprint, tokenizer_fingerprint
from m3model.loading.sizing import shape_of
from m3model.loading.spec import carried
from m3runtime.adapters.answers import Answer, Form, OnText, Prompt, Score
from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import GenerateConfig, MemoryConfig, ModelConfig
from m3runtime.errors import ConfigError, InputError
from m3runtime.memory.shape import ModelShape, memory_spec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.stream import Stream


class TransformersAdapter(Adapter):
    """A causal language model and its tokenizer. `count_tokens` may be called from any thread, the rest from one."""

    def __init__(self, model: Any, tokenizer: Any, memory: MemoryConfig, name: str) -> None:
        """Switch ``model`` to the attention of `m3model.attention`: only a `Session` can run it from now on."""
        memory = carried(model.config, memory)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.memory = memory
        self.layout = AttentionLayout.of(model)
        # In the user's turn, the template's beginning is the same for every conversation: it is computed once, as sink.
        self._head = turn_head(tokenizer) if memory.place == "turn" else ""
        self.sink = self._head + memory.sink
        self.spec = memory_spec(
            memory,
            layers=self.layout.layers,
            kv_heads=self.layout.kv_heads,
            head_dim=self.layout.head_dim,
            dtype=str(self.layout.dtype).removeprefix("torch."),
        )
        if not self.spec.dense:
            attention_modules(model, self.spec.layers)  # or the mistake would show only while a bank is written
        self.model_fingerprint = model_fingerprint(model)
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        prepare(model)
        self.sink_ids = self.ids(self.sink)
        bos = tokenizer.bos_token_id
        if bos is not None and not (self._head and self.sink_ids[0] == bos):
            self.sink_ids = [bos, *self.sink_ids]
        if not self.sink_ids:
            raise ConfigError("memory.sink: the sink has no token; this model needs some text there")
        self._sink: Sink = make_sink(model, self.sink_ids)
        self._arrange: Arrangement | None = None
        if (memory.sinks, memory.positions) != ("once", "parallel"):
            self._arrange = Arrangement(model, memory, self.spec.layers, self._sink, self.spec.reference_tokens)
        self.stop_tokens = _stop_tokens(model, tokenizer)

    @classmethod
    def open(cls, model: ModelConfig, memory: MemoryConfig) -> Self:
        """See `Adapter.open`."""
        loaded, tokenizer = load(model.path, model.dtype, model.device)
        return cls(loaded, tokenizer, memory, model.path)

    @classmethod
    def shape(cls, model: ModelConfig) -> ModelShape:
        """See `m3runtime.adapters.abilities.Sizing`."""
        return shape_of(model)

    @classmethod
    def carried(cls, model: ModelConfig, memory: MemoryConfig) -> MemoryConfig:
        """See `m3runtime.adapters.abilities.Sizing`."""
        return carried(configuration_of(model.path), memory)

    @property
    def device(self) -> torch.device:
        """See `Adapter.device`."""
        return self.layout.device

    @property
    def dtype(self) -> torch.dtype:
        """See `Adapter.dtype`."""
        return self.layout.dtype

    @property
    def offset(self) -> int:
        """Position of the first context token beside memories: they share what lies between the sink and it."""
        return len(self.sink_ids) + self.spec.reference_tokens

    def count_tokens(self, text: str) -> int:
        """See `Adapter.count_tokens`."""
        return len(self.ids(text))

    def cut(self, text: str, tokens: int) -> list[str]:
        """See `Adapter.cut` and `m3model.engine.cutting.cut`."""
        return cut(self.tokenizer, text, tokens)

    @torch.inference_mode()
    def encode(self, references: Sequence[str]) -> MemoryTensors:
        """See `Adapter.encode`: `encode_all`, and of that what ``memory.tokens_per_head`` says."""
        if self.spec.dense:
            return self.encode_all(references)
        memories, scores = self.encode_scored(references)
        return select(memories, scores, self.spec.tokens)

    @torch.inference_mode()
    def encode_all(self, references: Sequence[str]) -> MemoryTensors:
        """Memories of all tokens: causal, after the sink, at positions from the sink's end on (section 3.3)."""
        if not references:
            raise InputError("there is no reference to encode")
        ids = [self.ids(text) for text in references]
        for text, tokens in zip(references, ids, strict=True):
            if not text.strip() or not tokens:
                raise InputError("a blank text is no reference")
            if len(tokens) > self.spec.reference_tokens:
                raise InputError(
                    f"a reference has at most {self.spec.reference_tokens} tokens, not {len(tokens)}: {text[:40]!r}..."
                )
        counts = [len(tokens) for tokens in ids]
        width = max(counts)
        # No room for the context before the sink is in, or it would be made twice.
        session = Session(self.model, batch=len(ids), sink=self._sink, offset=len(self.sink_ids), context=0)
        with stopping_after(session.cache, self.spec.layers[-1]):
            session.forward(torch.tensor([row + [0] * (width - len(row)) for row in ids]), counts, logits=False)
        parts = [session.cache.context(layer) for layer in self.spec.layers]
        return MemoryTensors(
            keys=torch.stack([keys for keys, _ in parts], dim=1),
            values=torch.stack([values for _, values in parts], dim=1),
            tokens=torch.tensor(counts),
        )

    def encode_scored(self, references: Sequence[str]) -> tuple[MemoryTensors, torch.Tensor]:
        """Memories of all tokens, and the scores by which `select` chooses among them.

        The scores are ``float32[n, layers, kv_heads, T]`` on the model's device, zero beyond a memory's tokens: several
        counts of tokens can be tried after one encoding. Raises `InputError` as `Adapter.encode` does, and
        `ConfigError` as `observed` does.
        """
        with observed(self.model, self.spec.layers) as scores:
            memories = self.encode_all(references)
        return memories, torch.stack([scores[layer].to(self.device) for layer in self.spec.layers], dim=1)

    def importance(self, references: Sequence[str]) -> torch.Tensor:
        """See `m3runtime.adapters.abilities.Weighing` and `m3model.engine.importance`."""
        return importance(references, self.encode, self.ids, self.session)

    def baseline(self) -> TransformersBaseline:
        """See `m3runtime.adapters.comparison.Comparable`."""
        endless = copy.copy(self)
        endless.stop_tokens = frozenset()
        return TransformersBaseline(self.model, lambda prompts: self._read_by(prompts, None), endless)

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
        """See `Adapter.generate`."""
        began = time.perf_counter()
        return self._generation(prompts, streams, settings, on_text).run(began) if prompts else []

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], streams: Sequence[Stream] | None
    ) -> list[Score]:
        """See `Adapter.score`."""
        if len(continuations) != len(prompts):
            raise InputError(f"{len(prompts)} prompts, but {len(continuations)} continuations")
        if not prompts:
            return []
        rows = [
            Row(prompt, ids, self.ids(text))
            for prompt, ids, text in zip(prompts, self._read_by(prompts, streams), continuations, strict=True)
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
        """See `Adapter.examine`: the prompts are read once."""
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
        """See `Adapter.with_memory`."""
        return type(self)(self.model, self.tokenizer, memory, self.name)

    def render(self, question: str, form: Form, texts: Sequence[str] | None = None) -> Prompt:
        """See `Adapter.render` and `m3model.engine.prompts.render`."""
        return render(self.tokenizer, question, form, sink=self.memory.sink, texts=texts)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """See `Adapter.chat`; in the model's chat template."""
        return Prompt(chat(self.tokenizer, messages), query=messages[-1]["content"])

    def close(self) -> None:
        """See `Adapter.close`."""
        del self.model

    def _generation(
        self,
        prompts: Sequence[Prompt],
        streams: Sequence[Stream] | None,
        settings: GenerateConfig,
        on_text: OnText | None,
    ) -> Generation:
        ids = self._read_by(prompts, streams)
        room = max(len(row) for row in ids) + settings.max_new_tokens
        session = self.session(len(prompts), memories=streams is not None, context=room)
        return Generation(session, self.tokenizer, prompts, ids, streams, settings, self.stop_tokens, on_text)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without special tokens."""
        # `verbose=False`: a whole document may be counted, and that it exceeds the model's context is no news.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    def _read_by(self, prompts: Sequence[Prompt], streams: Sequence[Stream] | None) -> list[list[int]]:
        """The tokens of prompts, each to be read beside the stream of its row."""
        if streams is not None and len(streams) != len(prompts):
            raise InputError(f"{len(prompts)} prompts, but {len(streams)} streams")
        return [self._prompt_ids(prompt.text, sink=streams is not None) for prompt in prompts]

    def _prompt_ids(self, text: str, *, sink: bool) -> list[int]:
        """A sequence begins with one BOS: the sink's, the one that the chat template wrote, or else one put there."""
        if sink and self._head:
            if not text.startswith(self._head):
                raise ConfigError(
                    "memory.place is turn: prompts must be in the chat template and begin with the user; "
                    "set generate.prompt to chat, or memory.place to start"
                )
            return self.ids(f"\n\n{text.removeprefix(self._head)}")
        ids, bos = self.ids(text), self.tokenizer.bos_token_id
        if bos is None:
            return ids
        begins = ids[:1] == [bos]
        if sink:
            # A template that writes it again and again (SmolLM2's) means more by it than a beginning.
            return ids[1:] if begins and ids.count(bos) == 1 else ids
        return ids if begins else [bos, *ids]


def _stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    def flat(value: Any) -> Iterator[int]:
        if isinstance(value, int):
            yield value
        elif value is not None:
            yield from value

    return frozenset([*flat(model.generation_config.eos_token_id), *flat(tokenizer.eos_token_id)])
