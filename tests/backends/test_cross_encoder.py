"""Cross-encoders of sentence-transformers keep the laws of rerankers; other models are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from m3backends.rerankers.cross_encoder import CrossEncoderReranker
from m3runtime.errors import ConfigError
from m3runtime.testing.reranker import QUESTIONS, TEXTS, MakeReranker, RerankerContract

pytestmark = pytest.mark.slow  # importing the library takes longer than all tests of this file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder of one layer with random weights, which knows letters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = {piece: id for id, piece in enumerate([*special, *letters, *(f"##{letter}" for letter in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    path = tmp_path_factory.mktemp("cross-encoder")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    ).save_pretrained(path)
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=1,
        initializer_range=0.5,
    )
    BertForSequenceClassification(shape).save_pretrained(path)
    return path


class TestCrossEncoder(RerankerContract):
    @pytest.fixture(scope="class")
    @staticmethod
    def make_reranker(folder: Path) -> MakeReranker:
        return lambda: CrossEncoderReranker(folder, batch_size=3)


def test_scores_are_logits_of_the_model(folder: Path) -> None:
    from transformers import AutoTokenizer, BertForSequenceClassification

    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertForSequenceClassification.from_pretrained(folder)
    texts = [text for text in TEXTS if text.strip()]
    pairs = tokenizer([QUESTIONS[0]] * len(texts), texts, truncation=True, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**pairs).logits[:, 0].numpy()
    assert np.abs(CrossEncoderReranker(folder).score(QUESTIONS[0], texts) - logits).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertModel"]}, "is no cross-encoder"),
        ({"id2label": {"0": "a", "1": "b"}}, "is no cross-encoder"),
        ({"architectures": None}, "is no cross-encoder"),
        ({"model_type": "nothing"}, "cannot be loaded"),
    ],
)
def test_another_model_is_refused(folder: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "id2label": {"0": "a"}, **change}))
    with pytest.raises(ConfigError, match=rf"reranker cross-encoder: .*copy {message}"):
        CrossEncoderReranker(copy)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reranker cross-encoder: there is no model folder"):
        CrossEncoderReranker(tmp_path / "none")
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        CrossEncoderReranker(tmp_path / "none", batch_size=0)
    with pytest.raises(ConfigError, match="max_tokens must be at least 1"):
        CrossEncoderReranker(tmp_path / "none", max_tokens=0)
