"""Selection of tokens: each KV head keeps the tokens of a reference that receive the most attention.

Memory³, sections 3.3 and 4.4: attention is scored without causal mask and without positions. That takes queries and
keys as they are before rotation, so while references are encoded, the attention of each memory layer runs a second
time with position embeddings that rotate by nothing, and its queries and keys are looked at (`observed`).
"""

# Why not undo the rotation of the queries and keys that attention gets anyway? Because layers rotate in ways of their
# own: a part of the dimensions (Phi-3), other frequencies in other layers (Gemma 3), neighbours instead of halves
# (Cohere, GLM), scaled (YaRN), in some layers not at all (SmolLM3). A wrong guess would go unnoticed: it only chooses
# worse tokens. Hooks on projections would have to know where each family normalises. A layer that is asked again knows
# all this itself. It costs the projections of the memory layers, and nothing where all tokens are kept.

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from m3model.attention.layout import Pair
from m3model.attention.passes import PassLayer
from m3model.attention.versions import CACHE_NAMES
from m3runtime.errors import ConfigError
from m3runtime.memory.tensors import MemoryTensors


def attention_scores(
    query: Tensor, key: Tensor, valid: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """The attention that each token receives from all, ``w_j = sum_i softmax_j(q_i . k_j * scale)``.

    ``query`` is ``[B, Hq, T, D]`` and ``key`` ``[B, Hkv, T, D]``, both before RoPE; ``valid`` is ``bool[B, T]``, at
    least one token a row: the others neither ask nor are asked. Query heads that share a KV head are summed. Returns
    ``float32[B, Hkv, T]``, zero for tokens that are not valid.
    """
    batch, kv_heads, tokens, dim = key.shape
    grouped = query.float().reshape(batch, kv_heads, -1, dim)  # [B, Hkv, G * T, D]
    logits = grouped @ key.float().transpose(2, 3) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    weights = logits.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
    asked = weights.view(batch, kv_heads, -1, tokens, tokens)  # [B, Hkv, G, asking, asked]
    return asked.masked_fill(~valid[:, None, None, :, None], 0).sum((2, 3))


def most_attended(scores: Tensor, tokens: Tensor, count: int, budgets: Tensor | None = None) -> Tensor:
    """Positions of the tokens that each KV head keeps, ascending: ``int64[n, layers, kv_heads, min(count, T)]``.

    ``scores`` is ``[n, layers, kv_heads, T]``, ``tokens`` ``int64[n]``: how many of the T exist. Of equal
    scores the earlier token is kept. A row of fewer than ``count`` tokens keeps all of them first, and then positions
    of tokens that do not exist. With ``budgets``, ``int64[layers, kv_heads]``, a head keeps so many, and T follows.
    """
    exists = torch.arange(scores.shape[3], device=scores.device) < tokens[:, None].to(scores.device)
    ranked = scores.masked_fill(~exists[:, None, None], -torch.inf)
    kept = ranked.sort(dim=3, descending=True, stable=True).indices[..., :count]
    if budgets is not None:
        beyond = torch.arange(kept.shape[3], device=kept.device) >= budgets.to(kept.device)[..., None]
        kept = kept.masked_fill(beyond, scores.shape[3])
    return kept.sort(dim=3).values


def select(
    memories: MemoryTensors, scores: Tensor, count: int, heads: Pair | None = None, budgets: Tensor | None = None
) -> MemoryTensors:
    """Memories of the ``count`` best scored tokens of each layer and KV head, in order, out of memories of all tokens.

    ``scores`` is ``[n, layers, kv_heads, T]`` on the memories' device, as of `encode_scored`. Keys keep the positions
    that they had in the reference. Memories of no more than ``count`` tokens stay as they are. ``heads`` says which
    head's tokens a piece has (`AttentionLayout.heads_of_pieces`), where heads of a memory are pieces. ``budgets``,
    ``int64[layers, kv_heads]``, are those of heads that keep fewer: the rest of their ``count`` tokens is zero.
    """
    if budgets is None and memories.keys.shape[3] <= count:
        return memories
    kept = most_attended(scores, memories.tokens, count, budgets)
    width = memories.keys.shape[3]
    if budgets is not None:
        lacking, kept = (kept == width)[..., None], kept.clamp_max(width - 1)

    of_keys, of_values = (None, None) if heads is None else heads
    keys, values = _chosen(memories.keys, kept, of_keys), _chosen(memories.values, kept, of_values)
    if budgets is not None:
        keys, values = keys.masked_fill_(lacking, 0), values.masked_fill_(lacking, 0)
    return MemoryTensors(keys, values, memories.tokens.clamp_max(count))


def _chosen(x: Tensor, kept: Tensor, heads: Tensor | None) -> Tensor:
    """The tokens of ``x``, ``[n, layers, pieces, T, dim]``, that each piece's head keeps."""
    if heads is not None:
        kept = kept.gather(2, heads.to(kept.device)[None, :, :, None].expand(len(kept), -1, -1, kept.shape[3]))
    return x.gather(3, kept[..., None].expand(-1, -1, -1, -1, x.shape[4]))


def attention_modules(model: Any, layers: Sequence[int]) -> dict[int, nn.Module]:
    """The self-attention of these layers. Raises `ConfigError` if it cannot be run without rotation."""
    decoder = model.get_decoder()
    found = {}
    again = getattr(model.config.get_text_config(), "n_recurrent_loops", 1) > 1  # each time with other queries (Dory)
    for index in layers:
        own = None if again or not hasattr(decoder, "layers") else decoder.layers[index]
        attention = getattr(own, "self_attn", None)
        if attention is None or "position_embeddings" not in inspect.signature(attention.forward).parameters:
            raise ConfigError(
                f"memory.tokens_per_head must be all: a model of type {model.config.model_type} does not let "
                "its tokens be scored without their positions"
            )
        found[index] = attention
    return found


@contextmanager
def observed(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Score the tokens of every forward pass meanwhile: layer to ``float32[B, kv_heads, Q]``, of the last pass.

    The model must be one that `prepare` prepared, and be run by a `Session`. Only the tokens of the
    pass itself count, neither sink nor memories nor earlier context. Raises `ConfigError` if the model's layers are
    not built like Llama's. One thread.
    """
    scores: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for index, attention in attention_modules(model, layers).items():
            hooks.callback(_observe(attention, index, scores).remove)
        yield scores


def _observe(attention: nn.Module, index: int, scores: dict[int, Tensor]) -> Any:
    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scores[index] = _scored(module, args, kwargs, kwargs["m3_cache"].query_valid)

    return attention.register_forward_pre_hook(before, with_kwargs=True)


def score_passes(model: Any, layers: Sequence[int]) -> None:
    """Let these layers score their tokens, from now on, in passes that ask for it: see `PassLayer.query_valid`.

    Raises `ConfigError` as `observed` does.
    """
    for attention in attention_modules(model, layers).values():
        attention.register_forward_pre_hook(_score, with_kwargs=True)


def _score(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    own = kwargs.get("m3_cache")
    if isinstance(own, PassLayer) and own.query_valid is not None:
        own.scores = _scored(attention, args, kwargs, own.query_valid)


def _scored(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], valid: Tensor) -> Tensor:
    """Score the tokens of an attention by running it without rotation. Not by calling it: that would call its hooks."""
    found: list[Tensor] = []

    def look(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> None:
        found.append(attention_scores(query, key, valid, scale=scale, softcap=softcap))

    cos, sin = kwargs["position_embeddings"]
    unrotated = (torch.ones_like(cos), torch.zeros_like(sin))
    without = dict.fromkeys(name for name in CACHE_NAMES if name in kwargs)  # so keys are those of this pass alone
    with torch.no_grad():  # which tokens are kept is a choice: no gradient is asked of it
        attention.forward(*args, **{**kwargs, **without, "position_embeddings": unrotated, "m3_observer": look})
    return found[0]
