"""Tiny random models of every family, a tiny tokenizer, and an oracle that reads memories as plain text."""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from m3model.transformers import TransformersAdapter
from m3runtime.config.schema import MemoryConfig

LAYERS = 4
WINDOW = 12
"""Of layers with a sliding window: less than a reference has, and less than a context."""
REFERENCE_TOKENS = 24

TEXT = (
    "the harbour lamp of the old town burns walnut oil and turns once an hour; no ship has passed it since the year "
    "of the long frost, when seven keepers rowed out with blue lanterns and came home with a map, a bell and a heron"
)
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
# Gemma's tied embeddings, scaled up as it does, would make a random model repeat its last token for ever.
_GEMMA: dict[str, Any] = {
    "sliding_window": WINDOW,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "tie_word_embeddings": False,
}
_QWEN: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2": {},
    "qwen2-sliding": _QWEN,
    "qwen3": {"head_dim": 32},
    "qwen3-sliding": {"head_dim": 32, **_QWEN},
    "mistral": {"head_dim": 16},
    "mistral-sliding": {"sliding_window": WINDOW, "head_dim": 16},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {**_GEMMA, "sliding_window_pattern": 2},
    # Heads of another size in layers without a window, and last layers that read the keys of earlier ones.
    "gemma4_text": {
        **_GEMMA,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "initializer_range": 0.15,  # it does not scale its logits down
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,  # twice the numbers of the others: a memory of those is filled up
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
    },
    "gpt_oss-sliding": {  # with sinks of its own
        "head_dim": 16,
        "sliding_window": WINDOW,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
    },
    "phi3": {},
    "phi3-sliding": {"sliding_window": WINDOW},
    "olmo2": {},
}
ALIKE = [family for family in FAMILIES if family != "gemma4_text"]
"""Those whose layers are alike."""
BUDGETS = ((3, 12), (1, 1), (12, 7), (5, 2))
"""Tokens that heads keep, where they keep different numbers: of four layers with two KV heads."""
OTHERS: dict[str, dict[str, Any]] = {
    # More KV heads in layers with a window, and values shorter than keys.
    "mimo_v2_flash": {
        "head_dim": 16,
        "v_head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "sliding_window": WINDOW,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "nemotron": {"head_dim": 16, "initializer_range": 0.1},  # whose layers keep their arguments from attention
}
"""Families that are tried where it matters what is special about them."""
_FACTORS = [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.1, 3.8]
ROPES: dict[str, dict[str, Any]] = {
    "llama-linear": {"rope_type": "linear", "factor": 4.0},
    "llama-llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "qwen2-yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "phi3-partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "phi-partial": {"rope_type": "default", "partial_rotary_factor": 0.25},
    "phi3-longrope": {"rope_type": "longrope", "short_factor": _FACTORS, "long_factor": [4 * x for x in _FACTORS]},
    "llama-dynamic": {"rope_type": "dynamic", "factor": 2.0},
}
FIXED_POSITIONS = 128
"""Positions within which the frequencies of `BOUNDED` do not change."""
BOUNDED = ["phi3-longrope", "llama-dynamic"]
_VARIANTS = {
    **FAMILIES,
    **OTHERS,
    **{name: {"rope_parameters": {"rope_theta": 10_000.0, **rope}} for name, rope in ROPES.items()},
}
_VARIANTS["phi3-longrope"]["original_max_position_embeddings"] = FIXED_POSITIONS
_VARIANTS["llama-dynamic"]["max_position_embeddings"] = FIXED_POSITIONS + 1
SLIDING = [name for name in FAMILIES if "sliding" in name or name.startswith("gemma")]


@cache
def make_tokenizer(*, eos: bool = True, bos_in_chat: bool = False, text: str = TEXT) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens, trained on ``text``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>" if eos else None,
        chat_template="{{ bos_token }}" + CHAT if bos_in_chat else CHAT,
    )


@cache
def make_model(family: str, seed: int = 0) -> Any:
    """A model in stock eager attention, whose attention is far from uniform. Copy it before changing it."""
    vocabulary = len(make_tokenizer())
    special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
    options = {**_SIZE, **copy.deepcopy(_VARIANTS[family]), "vocab_size": vocabulary, **special}
    config = AutoConfig.for_model(family.partition("-")[0], **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # Norms and biases are ones and zeros at first, and a mistake with them would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.5 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")
    return model


def make_adapter(
    family: str = "llama", *, model: Any = None, tokenizer: Any = None, **memory: Any
) -> TransformersAdapter:
    """An adapter over a copy of the family's model, without an end-of-sequence token unless ``tokenizer`` has one."""
    settings = MemoryConfig.model_validate({"reference_tokens": REFERENCE_TOKENS, **memory})
    chosen = copy.deepcopy(make_model(family) if model is None else model)
    return TransformersAdapter(chosen, tokenizer or make_tokenizer(eos=False), settings, family)


def make_uneven(family: str) -> TransformersAdapter:
    """`make_adapter`, with `BUDGETS` if ``budgets`` follows the family's name."""
    name, _, uneven = family.partition(" ")
    return make_adapter(name, **({"tokens_per_head": BUDGETS} if uneven == "budgets" else {}))


def windows(model: Any) -> list[int | None]:
    """The sliding window of each layer."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def random_text(tokenizer: Any, tokens: int, seed: int) -> str:
    """A text that has exactly so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    words = TEXT.split()
    text = ""
    while len(tokenizer(text, add_special_tokens=False)["input_ids"]) < tokens:
        text += f" {words[int(torch.randint(len(words), (), generator=generator))]}"
    for end in range(len(text), 0, -1):
        if len(tokenizer(text[:end], add_special_tokens=False)["input_ids"]) == tokens:
            return text[:end]
    raise AssertionError("no text of that length")


def oracle(
    model: Any,
    sink: Sequence[int],
    references: Sequence[Sequence[int]],
    context: Sequence[int],
    *,
    offset: int,
    memory_layers: Sequence[int] | None = None,
    log_weights: Sequence[float] | None = None,
    kept: Sequence[Tensor] | None = None,
) -> Tensor:
    """Logits of the context's tokens by the stock model, in one forward pass over sink, references and context as text.

    References stand beside each other: each sees the sink and itself, the context sees all. Sliding windows hide
    tokens of a token's own segment only. Layers that are no memory layers do not let the context see references.
    ``kept`` says for each layer which tokens of all references each KV head lets the context see,
    ``bool[kv_heads, tokens]``.
    """
    segments = [sink, *references, context]
    starts = [0, *(len(sink) for _ in references), offset]
    positions = torch.cat([start + torch.arange(len(part)) for start, part in zip(starts, segments, strict=True)])
    segment = torch.cat([torch.full((len(part),), number) for number, part in enumerate(segments)])
    last = len(references) + 1
    same = segment[:, None] == segment[None]
    distance = positions[:, None] - positions[None]
    to_sink = segment[None] == 0
    is_reference = (segment > 0) & (segment < last)
    reads = (segment[:, None] == last) & is_reference[None]
    weight = torch.zeros(len(positions))
    for number, value in enumerate(log_weights or (), start=1):
        weight[segment == number] = value

    def mask(window: int | None, memory: bool, layer: int) -> Tensor:
        seen = (same & (distance >= 0)) | (to_sink & ~same)
        if window is not None:
            seen &= (distance < window) | ~same
        if memory and kept is None:
            seen |= reads
        elif memory and kept is not None:
            of_heads = torch.zeros(len(kept[layer]), len(positions), dtype=torch.bool)
            of_heads[:, is_reference] = kept[layer]
            groups = model.config.num_attention_heads // len(of_heads)
            seen = seen | (reads & of_heads.repeat_interleave(groups, 0)[:, None])
        added = torch.where(reads, weight[None], 0.0) if memory else torch.zeros(1)
        return torch.where(seen, added, torch.finfo(torch.float32).min).view(1, -1, *reads.shape)

    masks = [
        mask(window, memory_layers is None or layer in memory_layers, layer)
        for layer, window in enumerate(windows(model))
    ]
    with with_masks(model, masks), torch.no_grad():
        ids = torch.tensor([[token for part in segments for token in part]])
        logits: Tensor = model(ids, position_ids=positions[None], use_cache=False).logits[0]
    return logits[len(positions) - len(context) :]


class with_masks:  # noqa: N801 - a context manager, read like a function
    """Give each layer's attention its own mask."""

    def __init__(self, model: Any, masks: Sequence[Tensor]) -> None:
        self.model = model
        self.masks = masks
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        for layer, mask in zip(self.model.model.layers, self.masks, strict=True):
            self.hooks.append(layer.self_attn.register_forward_pre_hook(_replaced(mask), with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def _replaced(mask: Tensor) -> Callable[[nn.Module, Any, dict[str, Any]], tuple[Any, dict[str, Any]]]:
    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        assert "attention_mask" in kwargs
        return args, {**kwargs, "attention_mask": mask}

    return hook
