"""The adapter for causal language models of the transformers library, and `MemoryModel` over it.

Any architecture whose layers keep plain rotary keys and values, and hand their keyword arguments down to attention,
works: Llama, Qwen2, Qwen3, Mistral, Gemma 2 and 3, Phi-3 and OLMo2 are tested.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from pydantic import ValidationError

from m3model.generation import Generation
from m3model.layout import AttentionLayout
from m3model.loading import load, model_fingerprint, tokenizer_fingerprint
from m3model.prompts import chat, render
from m3model.session import Session, Sink, make_sink, prepare
from m3runtime.adapter import Adapter, Answer, Form, OnText, Prompt
from m3runtime.config import GenerateConfig, MemoryConfig, ModelConfig
from m3runtime.errors import ConfigError, InputError
from m3runtime.memory import Memories
from m3runtime.plugins import not_known, reason
from m3runtime.runtime import Runtime
from m3runtime.spec import MemorySpec
from m3runtime.stream import Stream


class TransformersAdapter(Adapter):
    """A causal language model and its tokenizer. `count_tokens` may be called from any thread, the rest from one."""

    def __init__(self, model: Any, tokenizer: Any, memory: MemoryConfig, name: str) -> None:
        """``model`` is put in the attention implementation of `m3model.attention`: a `Session` runs it from now on."""
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.memory = memory
        self.layout = AttentionLayout.of(model)
        self.sink = memory.sink
        self.spec = MemorySpec(
            layers=_layers(memory.layers, self.layout.layers),
            kv_heads=self.layout.kv_heads,
            tokens=memory.reference_tokens,
            head_dim=self.layout.head_dim,
            reference_tokens=memory.reference_tokens,
            dtype=str(self.layout.dtype).removeprefix("torch."),
        )
        self.model_fingerprint = model_fingerprint(model)
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        prepare(model)
        self.sink_ids = self._ids(memory.sink)
        if tokenizer.bos_token_id is not None:
            self.sink_ids = [tokenizer.bos_token_id, *self.sink_ids]
        if not self.sink_ids:
            raise ConfigError("memory.sink: the sink has no token; this model needs some text there")
        self._sink: Sink = make_sink(model, self.sink_ids)
        self.stop_tokens = _stop_tokens(model, tokenizer)

    @classmethod
    def open(cls, model: ModelConfig, memory: MemoryConfig) -> Self:
        """See `Adapter.open`."""
        loaded, tokenizer = load(model.path, model.dtype, model.device)
        return cls(loaded, tokenizer, memory, model.path)

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
        return len(self._ids(text))

    @torch.inference_mode()
    def encode(self, references: Sequence[str]) -> Memories:
        """See `Adapter.encode`. Causal, after the sink, at positions from the sink's end on (section 3.3)."""
        if not references:
            raise InputError("there is no reference to encode")
        ids = [self._ids(text) for text in references]
        for text, tokens in zip(references, ids, strict=True):
            if not text.strip() or not tokens:
                raise InputError("a blank text is no reference")
            if len(tokens) > self.spec.reference_tokens:
                raise InputError(
                    f"a reference has at most {self.spec.reference_tokens} tokens, not {len(tokens)}: {text[:40]!r}..."
                )
        counts = [len(tokens) for tokens in ids]
        width = max(counts)
        session = Session(self.model, batch=len(ids), sink=self._sink, offset=len(self.sink_ids), context=width)
        session.forward(torch.tensor([row + [0] * (width - len(row)) for row in ids]), counts, logits=False)
        parts = [session.cache.context(layer) for layer in self.spec.layers]
        return Memories(
            keys=torch.stack([keys for keys, _ in parts], dim=1),
            values=torch.stack([values for _, values in parts], dim=1),
            tokens=torch.tensor(counts),
        )

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
        if not prompts:
            return []
        if streams is not None and len(streams) != len(prompts):
            raise InputError(f"{len(prompts)} prompts, but {len(streams)} streams")
        ids = [self._prompt_ids(prompt.text, sink=streams is not None) for prompt in prompts]
        room = max(len(row) for row in ids) + settings.max_new_tokens
        session = self.session(len(prompts), memories=streams is not None, context=room)
        generation = Generation(session, self.tokenizer, prompts, ids, streams, settings, self.stop_tokens, on_text)
        return generation.run(began)

    def render(self, question: str, form: Form, texts: Sequence[str] | None = None) -> Prompt:
        """See `Adapter.render` and `m3model.prompts.render`."""
        return render(self.tokenizer, question, form, sink=self.sink, texts=texts)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """See `Adapter.chat`; in the model's chat template."""
        return Prompt(chat(self.tokenizer, messages), query=messages[-1]["content"])

    def close(self) -> None:
        """See `Adapter.close`."""
        del self.model

    def _ids(self, text: str) -> list[int]:
        # `verbose=False`: a whole document may be counted, and that it exceeds the model's context is no news.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    def _prompt_ids(self, text: str, *, sink: bool) -> list[int]:
        """A sequence begins with one BOS: the sink's, the one that the chat template wrote, or else one put there."""
        ids, bos = self._ids(text), self.tokenizer.bos_token_id
        if bos is None:
            return ids
        begins = ids[:1] == [bos]
        if sink:
            # A template that writes it again and again (SmolLM2's) means more by it than a beginning.
            return ids[1:] if begins and ids.count(bos) == 1 else ids
        return ids if begins else [bos, *ids]


class MemoryModel:
    """A model that reads memories while it generates, in a few lines. One call at a time.

    Without a runtime it is the model as it is.
    """

    def __init__(self, adapter: TransformersAdapter, runtime: Runtime | None = None) -> None:
        """Raises `BankMismatchError` if the runtime's bank was written by another model, tokenizer, sink or spec."""
        self.adapter = adapter
        self.runtime = runtime
        if runtime is not None:
            adapter.check(runtime.bank.manifest, runtime.bank.path)

    @classmethod
    def from_pretrained(
        cls, path: str, *, runtime: Runtime | None = None, dtype: str = "auto", device: str = "auto"
    ) -> Self:
        """Load a model from a folder, a hub name or a GGUF file. Raises `ConfigError` or `BankMismatchError`."""
        memory = runtime.config.memory if runtime is not None else MemoryConfig()
        model = ModelConfig.model_validate({"path": path, "dtype": dtype, "device": device})
        return cls(TransformersAdapter.open(model, memory), runtime)

    def generate(self, question: str | Sequence[str], *, on_text: OnText | None = None, **settings: Any) -> Any:
        """Answer a question, or several at once: an `Answer`, or a list of them.

        ``settings`` are those of the configuration's ``generate`` section and take precedence over it: ``prompt``,
        ``max_new_tokens``, ``temperature``, ``stop`` and so on.
        """
        one = isinstance(question, str)
        questions = [question] if isinstance(question, str) else list(question)
        config = self._config(settings)
        prompts = [self.adapter.render(text, config.prompt) for text in questions]
        answers = self._run(prompts, config, on_text)
        return answers[0] if one else answers

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, on_text: Callable[[str], None] | None = None, **settings: Any
    ) -> Answer:
        """The next message of a conversation in the model's chat template."""
        if not messages:
            raise InputError("a conversation has at least one message")
        show = None if on_text is None else lambda _, text: on_text(text)
        return self._run([self.adapter.chat(messages)], self._config(settings), show)[0]

    def _config(self, settings: Mapping[str, Any]) -> GenerateConfig:
        base = self.runtime.config.generate if self.runtime else GenerateConfig()
        try:
            return GenerateConfig.model_validate({**base.model_dump(), **settings})
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            if key not in GenerateConfig.model_fields:
                raise ConfigError(not_known("generate", key, GenerateConfig.model_fields)) from None
            raise ConfigError(f"generate.{key} {reason(first)}") from None

    def _run(self, prompts: list[Prompt], config: GenerateConfig, on_text: OnText | None) -> list[Answer]:
        if self.runtime is None:
            return self.adapter.generate(prompts, None, config, on_text)
        with ExitStack() as closing:
            streams = [closing.enter_context(self.runtime.stream(self.adapter.dtype)) for _ in prompts]
            return self.adapter.generate(prompts, streams, config, on_text)


def _layers(wanted: Any, count: int) -> tuple[int, ...]:
    """The memory layers that ``memory.layers`` names, of a model with ``count`` layers."""
    if wanted == "all":
        return tuple(range(count))
    if wanted == "first-half":
        return tuple(range(count // 2))
    chosen = tuple(sorted(set(wanted)))
    if not chosen or chosen[-1] >= count or chosen[0] < 0:
        raise ConfigError(f"memory.layers: the model has layers 0 to {count - 1}, not {list(wanted)}")
    return chosen


def _stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    def flat(value: Any) -> Iterator[int]:
        if isinstance(value, int):
            yield value
        elif value is not None:
            yield from value

    return frozenset([*flat(model.generation_config.eos_token_id), *flat(tokenizer.eos_token_id)])
