import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from m3backends.embedders.flag_embedding import FlagEmbedder
from m3runtime.errors import ConfigError, PluginError
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.testing.embedder import TEXTS, EmbedderContract, MakeEmbedder
from tests.backends.tiny_bge_m3 import write_bge_m3, write_bge_small

INSTRUCTION = "Represent this sentence for searching relevant passages: "


@pytest.fixture(scope="module")
def m3_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bge_m3(tmp_path_factory.mktemp("models") / "bge-m3")


@pytest.fixture(scope="module")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bge_small(tmp_path_factory.mktemp("models") / "bge-small-en-v1.5")


class TestBgeM3(EmbedderContract):
    @pytest.fixture(scope="class")
    @staticmethod
    def make_embedder(m3_path: Path) -> MakeEmbedder:
        return lambda: FlagEmbedder(m3_path, batch_size=4)


class TestBgeSmall(EmbedderContract):
    @pytest.fixture(scope="class")
    @staticmethod
    def make_embedder(small_path: Path) -> MakeEmbedder:
        return lambda: FlagEmbedder(small_path, batch_size=4)


def first_hidden_state(path: Path, texts: list[str]) -> Embeddings:
    """The normalised last hidden state of the first token, by transformers alone, one text at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    rows = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            state = model(**inputs).last_hidden_state[0, 0]
        rows.append((state / state.norm()).numpy())
    return np.stack(rows)


def test_bge_m3_is_the_first_hidden_state(m3_path: Path) -> None:
    embedder = FlagEmbedder(m3_path)
    texts = [text for text in TEXTS if len(text) < 100]
    expected = first_hidden_state(m3_path, texts)
    assert embedder.embed_references(texts) == pytest.approx(expected, abs=1e-5)
    assert embedder.embed_queries(texts) == pytest.approx(expected, abs=1e-5)


def test_bge_small_puts_its_instruction_before_queries(small_path: Path) -> None:
    embedder = FlagEmbedder(small_path)
    texts = [text for text in TEXTS if len(text) < 100]
    assert embedder.embed_references(texts) == pytest.approx(first_hidden_state(small_path, texts), abs=1e-5)
    asked = first_hidden_state(small_path, [INSTRUCTION + text for text in texts])
    assert embedder.embed_queries(texts) == pytest.approx(asked, abs=1e-5)


def test_vectors_are_those_of_flag_embedding_itself(m3_path: Path, small_path: Path) -> None:
    from FlagEmbedding import BGEM3FlagModel, FlagModel

    texts = [text for text in TEXTS if len(text) < 100]
    m3 = BGEM3FlagModel(str(m3_path), use_fp16=False, devices="cpu")
    assert FlagEmbedder(m3_path).embed_references(texts) == pytest.approx(
        m3.encode_corpus(texts)["dense_vecs"], abs=1e-5
    )
    small = FlagModel(str(small_path), use_fp16=False, devices="cpu", query_instruction_for_retrieval=INSTRUCTION)
    ours = FlagEmbedder(small_path, max_length=64)
    assert ours.embed_references(texts) == pytest.approx(small.encode_corpus(texts), abs=1e-5)
    short = [text[:10] for text in texts]
    assert ours.embed_queries(short) == pytest.approx(small.encode_queries(short), abs=1e-5)


def test_a_text_beyond_the_positions_of_the_model_is_embedded_in_windows(m3_path: Path) -> None:
    embedder = FlagEmbedder(m3_path, max_length=8192)
    long = embedder.embed_references(["ferry " * 500 + "lamp " * 500])[0]
    halves = embedder.embed_references(["ferry " * 500, "lamp " * 500])
    mean = halves.mean(0) / np.linalg.norm(halves.mean(0))
    assert long @ mean > 0.99
    assert embedder.embed_references(["ferry " * 500 + "oil " * 500])[0] != pytest.approx(long, abs=1e-5)


def test_fingerprint(m3_path: Path, small_path: Path, tmp_path: Path) -> None:
    embedder = FlagEmbedder(m3_path)
    assert FlagEmbedder(shutil.copytree(m3_path, tmp_path / "elsewhere")).fingerprint == embedder.fingerprint
    others = [
        FlagEmbedder(write_bge_m3(tmp_path / "other", seed=1)),
        FlagEmbedder(m3_path, max_length=32),
        FlagEmbedder(m3_path, query_instruction="Query: "),
        FlagEmbedder(small_path),
        FlagEmbedder(small_path, query_instruction=""),
    ]
    assert len({embedder.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_the_class_can_be_set(m3_path: Path) -> None:
    as_base = FlagEmbedder(m3_path, model_class="encoder-only-base")
    assert as_base.embed_queries(["a"]) == pytest.approx(FlagEmbedder(m3_path).embed_queries(["a"]), abs=1e-5)
    with pytest.raises(ConfigError, match="encoder-only-m3 or encoder-only-base, not 'm4'"):
        FlagEmbedder(m3_path, model_class="m4")


def test_a_name_tells_the_pooling(small_path: Path, tmp_path: Path) -> None:
    mean = FlagEmbedder(shutil.copytree(small_path, tmp_path / "e5-small"))
    texts = ["The ferry", "The lamp"]
    assert not np.allclose(mean.embed_references(texts), FlagEmbedder(small_path).embed_references(texts))


def test_a_decoder_is_refused(small_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bge-en-icl is a decoder"):
        FlagEmbedder(shutil.copytree(small_path, tmp_path / "bge-en-icl"))


def test_loading_and_embedding_print_nothing(
    m3_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    FlagEmbedder(m3_path, batch_size=2).embed_queries(["a"] * 100)
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == []


def test_unusable_folders(tmp_path: Path, m3_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no model folder /nowhere/bge-m3"):
        FlagEmbedder("/nowhere/bge-m3")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        FlagEmbedder(tmp_path)
    broken = shutil.copytree(m3_path, tmp_path / "broken")
    (broken / "colbert_linear.pt").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="broken cannot be loaded") as caught:
        FlagEmbedder(broken)
    assert "\n" not in str(caught.value)


def test_a_pickle_in_place_of_weights_runs_no_code(tmp_path: Path, m3_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    bad = shutil.copytree(m3_path, tmp_path / "bad")
    torch.save({"weight": Payload(), "bias": torch.zeros(32)}, bad / "colbert_linear.pt")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        FlagEmbedder(bad)
    assert not (tmp_path / "ran").exists()


def test_a_missing_package_names_the_extra(m3_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "FlagEmbedding", None)  # what Python itself keeps for a failed import
    with pytest.raises(PluginError, match=r"pip install 'm3runtime\[bge\]'"):
        FlagEmbedder(m3_path)
