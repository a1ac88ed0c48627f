"""Tiny checkpoints with the files and shapes of BGE's, random weights and real tokenizers."""

import io
from pathlib import Path

import sentencepiece
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    XLMRobertaConfig,
    XLMRobertaModel,
    XLMRobertaTokenizer,
)

SENTENCES = (
    "The harbour lamp burns walnut oil.",
    "The ferry sails every day except on Tuesday.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "A flat bread is baked with caraway and pumpkin.",
    "Represent this sentence for searching relevant passages:",
)


def write_bge_m3(folder: Path, seed: int = 0) -> Path:
    """BGE-M3's: XLM-RoBERTa, a sentencepiece tokenizer, and the two linear layers of its other vectors."""
    folder.mkdir(parents=True)
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=trained,
        model_type="unigram",
        vocab_size=100,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "sentencepiece.bpe.model").write_bytes(trained.getvalue())
    tokenizer = XLMRobertaTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,  # 64 tokens: the first position is that behind the padding's
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    model = XLMRobertaModel(config)
    spread(model)
    model.save_pretrained(folder)
    torch.save(torch.nn.Linear(32, 32).state_dict(), folder / "colbert_linear.pt")
    torch.save(torch.nn.Linear(32, 1).state_dict(), folder / "sparse_linear.pt")
    return folder


def write_bge_small(folder: Path, seed: int = 0) -> Path:
    """bge-small-en's: BERT with a WordPiece tokenizer that lowers case."""
    folder.mkdir(parents=True)
    letters = sorted({letter for sentence in SENTENCES for letter in sentence.lower() if letter != " "})
    words = sorted({word for sentence in SENTENCES for word in sentence.lower().rstrip(".:").split()})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *(f"##{x}" for x in letters)]
    vocabulary = {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}
    BertTokenizer(vocab=vocabulary, do_lower_case=True).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = BertModel(config)
    spread(model)
    model.save_pretrained(folder)
    return folder


def spread(model: torch.nn.Module) -> None:
    """Make weights so large that texts differ: a fresh model gives them all nearly the same vector."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
