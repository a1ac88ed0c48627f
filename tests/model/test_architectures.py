"""Every architecture of the transformers library keeps the parity law, in sessions and engine, or is refused in a line.

Models are tiny and random. The law is taken apart, so that the stock model alone is the oracle: a memory gives the
logits of its text where no window hides anything, and windows hide what they should where there is no memory.
"""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from m3model.attention.layout import AttentionLayout
from m3model.transformers import TransformersAdapter
from m3runtime.adapters.answers import Prompt
from m3runtime.config.schema import GenerateConfig
from m3runtime.errors import ConfigError
from tests.model.families import REFERENCE_TOKENS, WINDOW, make_adapter, random_text
from tests.model.given import GivenMemories

CONTEXT = 36
TOLERANCE = 1e-4
LARGEST = 30_000_000
"""Parameters of a model that a test may make."""

SIZE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
TOWER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1}
"""Of a model that sees or hears as well; its texts are all that is read here."""
_GEMMA4: dict[str, Any] = {  # heads of another size in layers without a window; the last two layers keep no keys
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 32,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 320,
    "use_bidirectional_attention": "vision",
}
_LOOPS: dict[str, Any] = {"n_input_layers": 1, "n_output_layers": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4": {
        "text_config": _GEMMA4,
        "vision_config": {**TOWER, "num_key_value_heads": 1, "head_dim": 16, "position_embedding_size": 64},
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "granite_swa": {"initializer_range": 0.1},  # whose multipliers make much of the last bit
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "mimo_v2_flash": {"v_head_dim": 8, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "gemma3": {"vision_config": {**TOWER, "image_size": 28, "patch_size": 14}},
    "got_ocr2": {"vision_config": {**TOWER, "output_channels": 16, "mlp_dim": 16, "image_size": 32}},
    "lfm2_moe": {"layer_types": ["full_attention"] * 4},
    "moss_transcribe_diarize": {"audio_config": TOWER},
    "phi4_multimodal": {
        "vision_config": {**TOWER, "image_size": 28, "crop_size": 28},
        "audio_config": {
            **TOWER,
            "num_blocks": 1,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
        },
    },
    "dory": _LOOPS,
    "hrm_text": {"initializer_range": 0.05},  # it runs its layers many times over, and would make much of the last bit
}
UNBUILT = {
    "cohere_compass_text",
    "dbrx",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "musicgen",
    "musicgen_melody",
    "qwen4_exp",
    "qwen4_exp_text",
    "reformer",
}
"""Architectures that the library makes no model of from their default configuration: nothing is known of them."""

ROOT = Path(__file__).parents[2]
DOCUMENTED = {
    kind
    for line in (ROOT / "docs" / "embed.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("> ")
    for kind in re.findall("`(.+?)`", line)
}

LATELY_WRONG = ["phimoe", "qwen2_moe", "olmoe", "afmoe", "nemotron"]
"""Their windows are in their masks alone, or in all but those; or their layers keep arguments from attention."""


def make(kind: str, window: int) -> Any:
    """A tiny model with this window, if it has any; without values and of the usual size if it cannot be tiny."""
    default = AutoConfig.for_model(kind)
    text = default.get_text_config()
    wanted = {**SIZE, "sliding_window": window, "use_sliding_window": True, "max_window_layers": 2}
    known = {*text.to_dict(), *text.attribute_map}
    sizes, options = {name: value for name, value in wanted.items() if name in known}, OPTIONS.get(kind, {})
    if text is not default:
        name = next(name for name in default.sub_configs if getattr(default, name, None) is text)
        sizes = {name: {**sizes, **options.get(name, {}), "model_type": text.model_type}}
        options = {key: value for key, value in options.items() if key != name}
    classes: Any = AutoModelForCausalLM
    try:
        config = AutoConfig.for_model(kind, **{**sizes, **options})
        with torch.device("meta"):
            empty = classes.from_config(config, dtype=torch.float32)
    except Exception:  # the sizes do not go together, as those of a model with states of its own
        with torch.device("meta"):
            AttentionLayout.of(classes.from_config(default))
        raise
    AttentionLayout.of(empty)
    assert sum(parameter.numel() for parameter in empty.parameters()) < LARGEST, "add sizes of this kind to OPTIONS"
    torch.manual_seed(0)
    model = classes.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def plain(model: Any, ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def memory_gap(model: Any) -> float:
    """The greatest difference between a memory and its text, read by a model whose windows hide nothing."""
    adapter = make_adapter(model=model)
    text = random_text(adapter.tokenizer, REFERENCE_TOKENS, seed=1)
    context = adapter.ids(random_text(adapter.tokenizer, CONTEXT, seed=2))
    memory = adapter.encode([text])
    session = adapter.session(1)
    session.read([[(memory.keys[0], memory.values[0])]])
    wanted = plain(model, [*adapter.sink_ids, *adapter.ids(text), *context])
    return gap(session.all_logits(torch.tensor([context]))[0], wanted[-CONTEXT:])


def window_gap(model: Any) -> float:
    """The greatest difference between our attention and the stock model's, over more tokens than the window has."""
    adapter: TransformersAdapter = make_adapter(model=copy.deepcopy(model))
    ids = adapter.ids(random_text(adapter.tokenizer, 5 * WINDOW, seed=3))
    return gap(adapter.session(1, memories=False).all_logits(torch.tensor([ids]))[0], plain(model, ids))


def engine_gap(model: Any, *, with_memory: bool) -> float:
    """The greatest difference between what the engine and the stock model say of the tokens that the engine wrote.

    Two rows at once, of which one reads its prompt in parts while the other one decodes.
    """
    stock = copy.deepcopy(model)
    adapter = make_adapter(model=model)
    text = random_text(adapter.tokenizer, REFERENCE_TOKENS, seed=1)
    prompts = [Prompt(random_text(adapter.tokenizer, length, seed=length)) for length in (3, 5 * WINDOW)]
    streams, before = None, [0] if adapter.tokenizer.bos_token_id is not None else []
    if with_memory:
        given = GivenMemories(adapter, [text])
        streams, before = [given.stream() for _ in prompts], [*adapter.sink_ids, *adapter.ids(text)]
    adapter.stop_tokens = frozenset()
    settings = GenerateConfig(max_new_tokens=2 * WINDOW, log_probs=0)
    gaps = []
    for prompt, answer in zip(prompts, adapter.generate(prompts, streams, settings), strict=True):
        ids = [*before, *adapter.ids(prompt.text), *answer.tokens]
        wanted = plain(stock, ids)[-len(answer.tokens) - 1 : -1].log_softmax(1)
        found = torch.tensor([one.log_prob for one in answer.log_probs])
        gaps.append(gap(found, wanted.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]))
    return max(gaps)


@pytest.mark.parametrize(
    "kind",
    [
        *LATELY_WRONG,
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            if kind not in LATELY_WRONG
        ),
    ],
)
def test_an_architecture_keeps_the_law_or_is_refused(kind: str) -> None:
    if kind in UNBUILT:
        pytest.skip("the library makes no model of it")
    refusal, gaps = "", []
    try:
        gaps = [
            memory_gap(make(kind, 512)),
            window_gap(make(kind, WINDOW)),
            engine_gap(make(kind, 512), with_memory=True),
            engine_gap(make(kind, WINDOW), with_memory=False),
        ]
    except ConfigError as error:
        refusal = str(error)
    except ImportError as error:
        pytest.skip(str(error))
    assert "\n" not in refusal
    assert (kind in DOCUMENTED) == bool(gaps)
    assert max(gaps, default=0.0) < TOLERANCE
    assert gaps or kind not in LATELY_WRONG


def test_the_readme_counts_them() -> None:
    assert f"[{len(DOCUMENTED)} read memories]" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("doge", {}, "each layer weighs and hides keys by their values, in masks of its own"),
        ("minimax", {}, "layers of the kind linear_attention keep no keys and values of all tokens"),
        ("minimax", {"layer_types": ["full_attention"] * 4}, "it takes no cache but its own"),
        ("deepseek_v3", {}, "its attention is latent: it keeps no keys and values of heads"),
        ("gpt2", {}, "its positions are not rotary, or it has no attention"),
        (
            "dory",
            {**_LOOPS, "recurrent_kv_cache_mode": "last_loop"},
            "a layer that runs several times keeps the keys of the last time alone",
        ),
    ],
)
def test_a_refusal_says_why(kind: str, options: dict[str, Any], reason: str) -> None:
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("this version of the library has no such model")
    classes: Any = AutoModelForCausalLM
    with torch.device("meta"):
        empty = classes.from_config(AutoConfig.for_model(kind, num_hidden_layers=4, **options))
    with pytest.raises(ConfigError, match=f"^a model of type {kind} cannot read memories: {reason}$"):
        AttentionLayout.of(empty)
