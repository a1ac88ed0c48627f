"""`Memory3ForCausalLM`: any causal language model of the transformers library, with the spec of its memories.

After `register`, ``AutoModelForCausalLM.from_pretrained`` loads what ``save_pretrained`` wrote. Given references, the
forward pass is that of Memory³'s continual training (section 3.6): the model itself encodes the references, and the
text reads them.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from m3model.attention.implementation import IMPLEMENTATION, prepare
from m3model.attention.layout import Pair
from m3model.attention.passes import EncodingPass, Pass, ReadMemories, hand_out
from m3model.attention.rope import check_positions, fixed_positions
from m3model.attention.selection import most_attended, score_passes
from m3model.attention.stopping import StoredError
from m3model.attention.versions import CACHE_NAMES, cache_name

NO_LABEL = -100
"""The label of a token without a loss."""


class Memory3Config(PreTrainedConfig):
    """A causal language model's configuration, and what its memories are."""

    model_type = "memory3"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - the library reads it off the class
    has_no_defaults_at_init = True

    def __init__(
        self,
        text_config: "PreTrainedConfig | dict[str, Any] | None" = None,
        memory_layers: "list[int] | None" = None,
        tokens_per_head: int = 8,
        reference_tokens: int = 128,
        sink: str = "Reference:",
        sink_ids: "list[int] | None" = None,
        chunk_tokens: int = 64,
        memories: int = 5,
        **rest: Any,
    ) -> None:
        """``text_config`` is the model's own; ``memory_layers`` default to its first half.

        ``sink`` is the text of the constant prefix and ``sink_ids`` its tokens, BOS included; a text's chunk of
        ``chunk_tokens`` sees the references of the last ``memories`` chunks, its own included. Raises `ValueError`
        for layers that the model does not have, or more ``tokens_per_head`` than ``reference_tokens``.
        """
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config: Any = text_config if text_config is not None else AutoConfig.for_model("llama")
        count = self.text_config.num_hidden_layers
        self.memory_layers = list(range(count // 2)) if memory_layers is None else sorted(set(memory_layers))
        if not self.memory_layers or self.memory_layers[0] < 0 or self.memory_layers[-1] >= count:
            raise ValueError(f"memory_layers must be among the layers 0 to {count - 1}, not {memory_layers}")
        if not 1 <= tokens_per_head <= reference_tokens:
            raise ValueError(f"tokens_per_head must be between 1 and reference_tokens, not {tokens_per_head}")
        self.tokens_per_head = tokens_per_head
        self.reference_tokens = reference_tokens
        self.sink = sink
        self.sink_ids = list(sink_ids or [])
        self.chunk_tokens = chunk_tokens
        self.memories = memories
        rest.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            rest.setdefault(name, getattr(self.text_config, name, None))
        super().__init__(**rest)


class Memory3ForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model that can be trained to read memories.

    Without references it is the model that it holds. With them it runs `m3model.attention`, which it switches to at
    the first such call and which `m3model.adapter.TransformersAdapter` needs as well: from then on ``generate`` is the
    adapter's. Gradient checkpointing is not supported, for it drops what layers hand to each other.
    """

    config_class = Memory3Config
    config: Memory3Config
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    accepts_loss_kwargs = True

    def __init__(self, config: Memory3Config) -> None:
        super().__init__(config)
        classes: Any = AutoModelForCausalLM  # whose methods have no types
        self.language_model: Any = classes.from_config(config.text_config)
        self._hands_out = self._scores = False
        """Do its layers get their own parts of passes? Do its memory layers score tokens?"""
        self._sinks: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        self.post_init()  # type: ignore[no-untyped-call]  # it has no types

    @classmethod
    def holding(cls, model: Any, config: Memory3Config) -> "Memory3ForCausalLM":
        """A Memory³ of a loaded model, whose parameters it takes as they are."""
        with torch.device("meta"):
            made = cls(config)
        made.language_model = model
        made.generation_config = model.generation_config
        made.train(model.training)
        return made

    def activation_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Raises `ValueError`: it would drop what layers hand to each other, memories among it, without a word."""
        raise ValueError("a Memory³ model cannot be trained with gradient checkpointing")

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """`activation_checkpointing_enable` by its older name."""
        self.activation_checkpointing_enable()

    def get_decoder(self) -> Any:
        """The layers."""
        return self.language_model.get_decoder()

    def get_input_embeddings(self) -> Any:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Set the language model's."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: Any) -> None:
        """Set the language model's head."""
        self.language_model.set_output_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        references: Tensor | None = None,
        reference_counts: Tensor | None = None,
        reference_places: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **rest: Any,
    ) -> CausalLMOutputWithPast:
        """The logits of a text, ``[B, T, vocabulary]``, and with ``labels`` the mean loss of predicting the next token.

        ``references`` is int64 ``[B, chunks, R]``, padded on the right, and ``reference_counts`` int64 ``[B, chunks]``
        says how many tokens each has: what was retrieved for each chunk of ``config.chunk_tokens`` of the text, or 0
        for nothing. With ``reference_places``, int64 ``[B, chunks]``, they are ``[n, R]`` and ``[n]``: the distinct
        references, and which of them each chunk retrieved. ``input_ids`` ``[B, T]`` are then the text without BOS,
        which is the sink's; padding stands on the right. Each token sees the text before it, the sink, and the
        memories of its chunk and of the ``config.memories - 1`` before it. Gradients flow through the memories' keys
        and values, not through their selection.
        """
        if references is None or reference_counts is None:
            if labels is not None:
                rest["labels"] = labels
                rest["num_items_in_batch"] = num_items_in_batch
            if self.config._attn_implementation == IMPLEMENTATION and "m3_cache" not in rest:
                rest |= self._alone(input_ids, attention_mask, _given(rest))
            return self.language_model(input_ids=input_ids, attention_mask=attention_mask, **rest)  # type: ignore[no-any-return]
        if input_ids is None or _given(rest) is not None:
            raise ValueError("a text that reads references is given as a whole, by its input_ids")
        memories = self.encode(references, reference_counts, reference_places)
        logits = self._read(input_ids, memories)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def _alone(self, ids: Tensor | None, attention_mask: Tensor | None, past: Any) -> dict[str, Any]:
        """The arguments of a forward pass without memories: no sink, and positions from 0."""
        if ids is None or past is not None:
            raise ValueError("once this model has read references, the adapter generates; `generate` does not")
        self._prepare()
        valid = None if attention_mask is None else attention_mask.bool()
        alone = Pass(self.config.text_config.num_hidden_layers, 0, self._places(ids, 0), valid=valid)
        own = {cache_name(self): alone, "m3_cache": alone}
        return {**own, "position_ids": alone.positions, "use_cache": True}

    def encode(self, references: Tensor, counts: Tensor, places: Tensor | None = None) -> "EncodedReferences":
        """The memories of references: keys and values of the tokens that each KV head of each memory layer keeps.

        The same as `TransformersAdapter.encode` computes (section 3.3), but gradients flow through it. The arguments
        are those of the forward pass. Equal references are encoded once.
        """
        self._prepare()
        if places is None:
            batch, chunks, width = references.shape
            rows = torch.cat([counts.reshape(-1, 1), references.reshape(-1, width)], dim=1)
            distinct, flat = torch.unique(rows, dim=0, return_inverse=True)
            references, counts, places = distinct[:, 1:], distinct[:, 0], flat.view(batch, chunks)
        number, width = references.shape
        sink = self._sink(number)
        steps = torch.arange(width, device=references.device)
        valid = steps < counts.clamp_min(1)[:, None]  # a missing reference is encoded as its padding
        last = (counts - 1).clamp_min(0)[:, None]
        positions = torch.cat(
            [self._places(sink, 0), sink.shape[1] + torch.minimum(steps.expand(number, -1), last)], dim=1
        )
        layers, most = self.config.memory_layers, self.config.tokens_per_head
        if selects := most < width:
            self._score()
        encoding = EncodingPass(
            self.config.text_config.num_hidden_layers, sink.shape[1], valid, positions, layers, scores=selects
        )
        with suppress(StoredError):
            self._run(torch.cat([sink, references], dim=1), encoding, keep=1)
        parts = dict(zip(layers, encoding.memories_of(layers), strict=True))
        if selects:
            scores = torch.stack([encoding.scores_of(layer) for layer in layers], dim=1)
            kept = most_attended(scores, counts.clamp_min(1), most).transpose(0, 1)[:, None, ..., None]
            stacked = torch.stack([torch.stack(parts[layer]) for layer in layers])  # [layers, 2, n, kv_heads, R, D]
            chosen = stacked.gather(4, kept.expand(-1, 2, -1, -1, -1, stacked.shape[5]))
            parts = {layer: (pair[0], pair[1]) for layer, pair in zip(layers, chosen, strict=True)}
        return EncodedReferences(parts, counts.clamp_max(most), places)

    def _read(self, ids: Tensor, memories: "EncodedReferences") -> Tensor:
        batch, length = ids.shape
        chunks, needed = memories.places.shape[1], -(-length // self.config.chunk_tokens)
        if needed > chunks:
            raise ValueError(f"a text of {length} tokens has {needed} chunks, not {chunks}")
        sink = self._sink(batch)
        start = sink.shape[1] + self.config.reference_tokens
        check_positions(start + length, fixed_positions(self.config.get_text_config()))
        positions = torch.cat([self._places(sink, 0), self._places(ids, start)], dim=1)
        read = memories.read(self.config.chunk_tokens, self.config.memories)
        reading = Pass(self.config.text_config.num_hidden_layers, sink.shape[1], positions, memories=read)
        return self._run(torch.cat([sink, ids], dim=1), reading, keep=length)

    def _run(self, ids: Tensor, cache: Pass, keep: int) -> Tensor:
        output = self.language_model(
            input_ids=ids,
            position_ids=cache.positions,
            use_cache=True,
            logits_to_keep=keep,
            m3_cache=cache,
            **{cache_name(self): cache},
        )
        return output.logits  # type: ignore[no-any-return]

    def _prepare(self) -> None:
        """Switch to this attention, at the first call."""
        if self.config._attn_implementation != IMPLEMENTATION:
            prepare(self)
        if not self._hands_out:
            hand_out(self)
            self._hands_out = True

    def _score(self) -> None:
        """Let memory layers score tokens, at the first call."""
        if not self._scores:
            score_passes(self, self.config.memory_layers)
            self._scores = True

    def _sink(self, rows: int) -> Tensor:
        of = (self.device, tuple(self.config.sink_ids))
        if of not in self._sinks:  # a copy to the device waits for all that is queued there
            self._sinks[of] = torch.tensor(of[1], dtype=torch.int64, device=self.device)
        return self._sinks[of].expand(rows, -1)

    @staticmethod
    def _places(ids: Tensor, start: int) -> Tensor:
        return torch.arange(start, start + ids.shape[1], device=ids.device).expand(ids.shape[0], -1)


class EncodedReferences:
    """The distinct references of a batch as memories, and which of them each chunk retrieved."""

    def __init__(self, parts: dict[int, Pair], tokens: Tensor, places: Tensor) -> None:
        """``parts`` has of each layer keys and values, ``[n, kv_heads, K, head_dim]``; row ``i`` has ``tokens[i]``.

        ``places`` is int64 ``[B, chunks]``: the row of each chunk.
        """
        self.parts = parts
        self.tokens = tokens
        self.places = places

    def read(self, chunk_tokens: int, chunks: int) -> ReadMemories:
        """What texts of chunks of so many tokens read, each token the memories of so many ``chunks``."""
        width = next(iter(self.parts.values()))[0].shape[2]
        return ReadMemories(self.parts, self.places, self.tokens[self.places], width, chunk_tokens, chunks)


def _given(arguments: dict[str, Any]) -> Any:
    """The cache among a forward pass' arguments, or None."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def register() -> None:
    """Let ``AutoConfig`` and ``AutoModelForCausalLM`` know the model. Calling it again is fine."""
    AutoConfig.register(Memory3Config.model_type, Memory3Config, exist_ok=True)
    AutoModelForCausalLM.register(Memory3Config, Memory3ForCausalLM, exist_ok=True)
