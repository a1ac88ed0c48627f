"""`MeanOfTokens`: BERT models such as MiniLM, whose vectors are the mean over tokens, by torch alone.

The sentence-transformers library takes seconds of CPU time to import. For the models that most banks use it computes
what stands here: a BERT encoder, the mean over the tokens, and length one.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from m3backends.embedders.loading import PROBE, model_fingerprint, share_of
from m3runtime.retrieval.embedder import Embeddings

_MODULES = ["Transformer", "Pooling", "Normalize"]
_CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
"""The kind of BERT that `MeanOfTokens` is; a configuration says nothing else."""
_TOKENIZER = {
    "tokenizer_class": ("BertTokenizer", "BertTokenizerFast"),
    "do_basic_tokenize": (True,),
    "never_split": (None,),
    "truncation_side": ("right",),
    "do_lower_case": (True,),
    "strip_accents": (None,),
    "tokenize_chinese_chars": (True,),
    "unk_token": ("[UNK]",),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "pad_token": ("[PAD]",),
    "mask_token": ("[MASK]",),
}
"""The values that a tokenizer's configuration may have for each key: those of BERT's uncased tokenizer."""
_NORMALIZER = {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": None,
    "lowercase": True,
}


@dataclass(frozen=True, slots=True)
class _Texts:
    """The tokens of B texts one after another, N in all: only attention pads them, to the T tokens of the longest."""

    ids: Tensor
    """Int64 ``[N]``."""
    positions: Tensor
    """The place of each token in its text, int64 ``[N]``."""
    lengths: Tensor
    """Int64 ``[B]``."""
    places: Tensor | None
    """Where each token stands when they are padded, int64 ``[N]`` below ``B * T``; None if all are equally long."""
    seen: Tensor | None
    """The tokens that attention reads of each text, bool ``[B, 1, 1, T]``; None for all."""

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], device: torch.device) -> Self:
        """These tokens, on a device."""
        lengths = torch.tensor([len(text) for text in texts])
        real = torch.arange(int(lengths.max())) < lengths[:, None]  # [B, T]
        row, position = real.nonzero(as_tuple=True)
        places = seen = None
        if not real.all():
            places, seen = (row * real.shape[1] + position).to(device), real[:, None, None].to(device)
        ids = torch.tensor([token for text in texts for token in text])
        return cls(ids.to(device), position.to(device), lengths.to(device), places, seen)

    def padded(self, rows: Tensor) -> Tensor:
        """``[N, ...]`` as ``[B, T, ...]``, with zeros after the end of each text."""
        if self.seen is None or self.places is None:
            return rows.view(len(self.lengths), -1, *rows.shape[1:])
        batch, length = self.seen.shape[0], self.seen.shape[3]
        room = rows.new_zeros(batch * length, *rows.shape[1:])
        return room.index_copy_(0, self.places, rows).view(batch, length, *rows.shape[1:])

    def packed(self, padded: Tensor) -> Tensor:
        """``[B, T, ...]`` as ``[N, ...]``."""
        rows = padded.flatten(0, 1)
        return rows if self.places is None else rows.index_select(0, self.places)


class MeanOfTokens:
    """Embeds as sentence-transformers does with the same folder. The vectors are equal to 1e-6. Not thread-safe."""

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, Tensor], tokenizer: Any, longest: int, device: str
    ) -> None:
        self.weights = {name: value.to(device) for name, value in weights.items() if not name.endswith("position_ids")}
        self.tokenizer = tokenizer
        self.longest = longest
        self.dim = int(config["hidden_size"])
        self._layers = int(config["num_hidden_layers"])
        self._heads = int(config["num_attention_heads"])
        self._eps = float(config.get("layer_norm_eps", 1e-12))

    @classmethod
    def of(cls, folder: Path, device: str) -> Self | None:
        """The model in a folder of sentence-transformers, or None if the library has to run or to refuse it."""
        try:
            steps = [step["type"].rpartition(".")[2] for step in _json(folder, "modules.json")]
            config, longest = _json(folder, "config.json"), _json(folder, "sentence_bert_config.json")
            pooling, prompts = (
                _json(folder, "1_Pooling/config.json"),
                _json(folder, "config_sentence_transformers.json"),
            )
            tokens, stated = _json(folder, "tokenizer_config.json"), _json(folder, "tokenizer.json")
            ours = (
                steps == _MODULES
                and all(config.get(key, value) == value for key, value in _CONFIG.items())
                and "quantization_config" not in config
                and _pools_mean(pooling)
                and not longest.get("do_lower_case")
                and 2 < int(longest["max_seq_length"]) <= int(config["max_position_embeddings"])
                and not any((prompts.get("prompts") or {}).values())
                and prompts.get("default_prompt_name") is None
                and all(tokens.get(key, ours[0]) in ours for key, ours in _TOKENIZER.items())
                and stated["normalizer"] == _NORMALIZER
                and stated["pre_tokenizer"] == {"type": "BertPreTokenizer"}
                and stated["model"]["type"] == "WordPiece"
                and all(one["special"] for one in stated["added_tokens"])
            )
            if not ours:
                return None
            weights = load_file(folder / "model.safetensors")
            if any(value.is_floating_point() and value.dtype != torch.float32 for value in weights.values()):
                return None
            from tokenizers import Tokenizer  # of the optional packages

            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            model = cls(config, weights, tokenizer, int(longest["max_seq_length"]), device)
            model.embed(["dim"], 1)  # so that a weight that is missing or misshapen shows
            return model
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError):
            return None  # a folder of another kind, or a damaged one: the library says what is wrong with it

    def fingerprint(self, prompts: Mapping[str, str | None]) -> str:
        """The fingerprint that the same model has when sentence-transformers runs it."""
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        settings = {
            "steps": [
                ["Pooling", {"embedding_dimension": self.dim, "pooling_mode": "mean", "include_prompt": True}],
                [
                    "Normalize",
                    {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"},
                ],
            ],
            "longest": self.longest,
            "model_prompts": {},
            "default_prompt": None,
            "prompts": dict(prompts),
        }
        named = ((f"0.model.{name}", value) for name, value in self.weights.items())
        return model_fingerprint(named, self.tokenizer.get_vocab(), self.tokenizer.encode(PROBE).ids, settings)

    def unknown_share(self, texts: Sequence[str]) -> float:
        """The share of tokens that are [UNK]."""
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        ids = [one.ids for one in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        return share_of(self.tokenizer.token_to_id("[UNK]"), ids)

    def spans(self, text: str) -> Sequence[tuple[int, int]]:
        """The characters of each token of a text."""
        self.tokenizer.no_truncation()
        spans: list[tuple[int, int]] = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return spans

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch_size: int) -> Embeddings:
        """``float32[n, dim]`` of about length 1. Texts of similar length are computed together."""
        self.tokenizer.enable_truncation(self.longest)
        self.tokenizer.no_padding()
        ids = [one.ids for one in self.tokenizer.encode_batch(list(texts))]
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for rows in _batches(ids, batch_size):
            vectors[rows] = self._means([ids[row] for row in rows]).cpu().numpy()
        return vectors

    @torch.inference_mode()
    def tokens(self, text: str) -> tuple[Embeddings, Embeddings]:
        """The vectors of a text's tokens, ``float32[tokens, dim]`` with the special ones, and their mean."""
        self.tokenizer.enable_truncation(self.longest)
        self.tokenizer.no_padding()
        texts = _Texts.of([self.tokenizer.encode(text).ids], self._device)
        hidden = self._hidden(texts)
        return hidden.cpu().numpy(), hidden.mean(0).cpu().numpy()

    @property
    def _device(self) -> torch.device:
        return self.weights["embeddings.word_embeddings.weight"].device

    def _means(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """The mean over the tokens of each text: ``float32[B, dim]`` of length 1."""
        texts = _Texts.of(ids, self._device)
        return F.normalize(texts.padded(self._hidden(texts)).sum(1) / texts.lengths[:, None])

    def _hidden(self, texts: "_Texts") -> Tensor:
        """The last hidden states, ``[N, dim]``."""
        words, places, kinds = (
            self.weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
        )
        hidden = self._norm(words[texts.ids] + places[texts.positions] + kinds[0], "embeddings.LayerNorm")
        for number in range(self._layers):
            at = f"encoder.layer.{number}."
            heads = (
                self._linear(hidden, f"{at}attention.self.{name}").unflatten(1, (self._heads, -1))
                for name in ("query", "key", "value")
            )  # each [N, H, D]
            queries, keys, values = (texts.padded(one).transpose(1, 2) for one in heads)  # each [B, H, T, D]
            read = F.scaled_dot_product_attention(queries, keys, values, texts.seen).transpose(1, 2)
            change = self._linear(texts.packed(read).flatten(1), f"{at}attention.output.dense")
            hidden = self._norm(hidden + change, f"{at}attention.output.LayerNorm")
            inner = F.gelu(self._linear(hidden, f"{at}intermediate.dense"))
            hidden = self._norm(hidden + self._linear(inner, f"{at}output.dense"), f"{at}output.LayerNorm")
        return hidden

    def _linear(self, rows: Tensor, name: str) -> Tensor:
        return F.linear(rows, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, rows: Tensor, name: str) -> Tensor:
        return F.layer_norm(rows, (self.dim,), self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self._eps)


def _pools_mean(pooling: Mapping[str, Any]) -> bool:
    """True if the mean over all tokens is the only pooling, in the older or the newer form of the file."""
    modes = {name for name, value in pooling.items() if name.startswith("pooling_mode_") and value}
    mean = modes == {"pooling_mode_mean_tokens"} if "pooling_mode" not in pooling else pooling["pooling_mode"] == "mean"
    return mean and bool(pooling.get("include_prompt", True))


def _batches(ids: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Rows in groups of this size, longest first."""
    longest_first = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
    for start in range(0, len(longest_first), size):
        yield longest_first[start : start + size]


def _json(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))
