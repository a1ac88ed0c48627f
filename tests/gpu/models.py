"""A language model and an embedder of real shapes with random weights, made without a model hub."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama and of a BERT."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    embedder_layers: int
    embedder_hidden: int
    embedder_heads: int


REAL = Shape(30, 576, 9, 3, 1536, 49_152, 6, 384, 12)
"""SmolLM2-135M and all-MiniLM-L6-v2."""
TINY = Shape(4, 64, 4, 2, 96, 400, 2, 32, 2)


def topics() -> list[str]:
    """Texts that every installation has: the Python language's own reference."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def make_model(folder: Path, shape: Shape, dtype: torch.dtype) -> None:
    """Save a Llama and its byte-level tokenizer, whose vocabulary is the model's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(topics(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    config = llama(shape, len(fast))
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    fast.save_pretrained(folder)


def llama(shape: Shape, vocabulary: int) -> LlamaConfig:
    """The configuration of a Llama of this shape."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def make_embedder(folder: Path, shape: Shape) -> None:
    """Save a BERT with mean pooling, as sentence-transformers reads it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        topics(), trainers.WordPieceTrainer(vocab_size=8192, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=256,
    )
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=shape.embedder_hidden,
        num_hidden_layers=shape.embedder_layers,
        num_attention_heads=shape.embedder_heads,
        intermediate_size=4 * shape.embedder_hidden,
    )
    torch.manual_seed(1)
    BertModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(kinds.items())
    ]
    _write(folder / "modules.json", modules)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": 256, "do_lower_case": False})
    pooling = {"word_embedding_dimension": shape.embedder_hidden, "pooling_mode_mean_tokens": True}
    _write(folder / "1_Pooling" / "config.json", pooling)
    (folder / "2_Normalize").mkdir()


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
