import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from m3backends.embedders.bert import MeanOfTokens
from m3backends.embedders.loading import find_model, model_fingerprint, unit_rows
from m3backends.embedders.sentence_transformers import SentenceTransformersEmbedder
from m3runtime.errors import ConfigError, PluginError
from m3runtime.testing.embedder import TEXTS, EmbedderContract, MakeEmbedder
from tests.end_to_end.commands import environment

pytestmark = pytest.mark.real_model


class TestMiniLM(EmbedderContract):
    @pytest.fixture(scope="class")
    @staticmethod
    def make_embedder(minilm_path: Path) -> MakeEmbedder:
        return lambda: SentenceTransformersEmbedder(minilm_path, batch_size=8)


@pytest.fixture(scope="module")
def minilm(minilm_path: Path) -> SentenceTransformersEmbedder:
    return SentenceTransformersEmbedder(minilm_path)


@pytest.fixture
def copy(minilm_path: Path, tmp_path: Path) -> Path:
    """A copy of MiniLM whose files may be changed."""
    return shutil.copytree(minilm_path, tmp_path / "copy")


def test_near_in_meaning_is_near_in_vectors(minilm: SentenceTransformersEmbedder) -> None:
    references = [
        "The harbour lamp of the town is painted purple and burns walnut oil.",
        "An abstract data type is known only by its operations.",
        "The bakery sells a flat bread with caraway for two pellins.",
        "The assignment statement binds a name to a value.",
    ]
    queries = [
        "What fuel does the lighthouse use?",
        "Which concept hides how data is represented?",
        "What does a loaf cost?",
        "How do I set a variable in Python?",
    ]
    scores = minilm.embed_queries(queries) @ minilm.embed_references(references).T
    assert scores.argmax(1).tolist() == [0, 1, 2, 3]


def pool_first_tokens(folder: Path) -> None:
    """Pool by CLS, for which the library has to run the model."""
    (folder / "1_Pooling/config.json").write_text('{"word_embedding_dimension": 384, "pooling_mode_cls_token": true}')


def longer_texts(folder: Path) -> None:
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 512, "do_lower_case": false}')


def newer_pooling(folder: Path) -> None:
    (folder / "1_Pooling/config.json").write_text('{"embedding_dimension": 384, "pooling_mode": "mean"}')


def cased(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "do_lower_case": False}))


def own_prompts(folder: Path) -> None:
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"query": "ask: "}}')


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "light"),
    [(None, True), (longer_texts, True), (newer_pooling, True)]
    + [(change, False) for change in (pool_first_tokens, cased, own_prompts)],
)
def test_vectors_are_those_of_the_library(copy: Path, change: Callable[[Path], None] | None, light: bool) -> None:
    from sentence_transformers import SentenceTransformer  # takes seconds, which other tests need not

    pooling = type(SentenceTransformer(str(copy), device="cpu")[1])
    if change is newer_pooling and "embedding_dimension" not in inspect.signature(pooling).parameters:
        pytest.skip("this version of the library does not write it so")
    if change:
        change(copy)
    assert (MeanOfTokens.of(copy, "cpu") is not None) == light
    embedder = SentenceTransformersEmbedder(copy, batch_size=4)
    library = SentenceTransformer(str(copy), device="cpu")
    texts = [*TEXTS, "Of the harbour " * 80, "a [SEP] b [MASK] \x00\u200b\u4e09 ", "walnut " * 250]
    assert (
        np.abs(embedder.embed_references(texts) - library.encode_document(texts, normalize_embeddings=True)).max()
        < 1e-6
    )
    short = list(TEXTS)
    assert np.abs(embedder.embed_queries(short) - library.encode_query(short, normalize_embeddings=True)).max() < 1e-6


def test_banks_of_earlier_releases_know_the_fingerprint(minilm: SentenceTransformersEmbedder) -> None:
    """Sentence-transformers ran the model then."""
    assert minilm.fingerprint == "237843b9aa6287eba4e90de59310198b"


def test_minilm_imports_neither_of_the_heavy_libraries(minilm_path: Path) -> None:
    code = f"""
import sys
from m3backends.embedders.sentence_transformers import SentenceTransformersEmbedder
SentenceTransformersEmbedder({str(minilm_path)!r}).embed_queries(["Why?"])
print(sorted({{"sentence_transformers", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_path_does_not_count_for_the_fingerprint(copy: Path, minilm: SentenceTransformersEmbedder) -> None:
    assert SentenceTransformersEmbedder(str(copy)).fingerprint == minilm.fingerprint


def test_weights_count_for_the_fingerprint(copy: Path, minilm: SentenceTransformersEmbedder) -> None:
    weights = load_file(copy / "model.safetensors")
    name = "encoder.layer.3.output.dense.weight"
    weights[name] = weights[name] * 1.01
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert SentenceTransformersEmbedder(copy).fingerprint != minilm.fingerprint


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("1_Pooling/config.json", "pooling_mode_cls_token", True),
        ("sentence_bert_config.json", "max_seq_length", 100),
        ("tokenizer_config.json", "do_lower_case", False),
    ],
)
def test_what_changes_vectors_changes_the_fingerprint(
    copy: Path, minilm: SentenceTransformersEmbedder, file: str, key: str, value: object
) -> None:
    config = json.loads((copy / file).read_text())
    if file.startswith("1_Pooling"):
        config = {name: False if name.startswith("pooling_mode") else kept for name, kept in config.items()}
    (copy / file).write_text(json.dumps({**config, key: value}))
    assert SentenceTransformersEmbedder(copy).fingerprint != minilm.fingerprint


def test_prompts(minilm_path: Path, minilm: SentenceTransformersEmbedder) -> None:
    prompted = SentenceTransformersEmbedder(minilm_path, query_prompt="query: ", reference_prompt="passage: ")
    assert prompted.fingerprint != minilm.fingerprint
    plain = minilm.embed_references(["query: ferry", "passage: ferry"])
    assert prompted.embed_queries(["ferry"])[0] == pytest.approx(plain[0], abs=1e-5)
    assert prompted.embed_references(["ferry"])[0] == pytest.approx(plain[1], abs=1e-5)


def test_the_tail_of_a_long_text_is_found(minilm: SentenceTransformersEmbedder) -> None:
    filler = " ".join(f"The mill of house {number} grinds rye in autumn." for number in range(40))
    tails = ["The harbour lamp burns walnut oil.", "Orla Tenn bakes flat bread with caraway."]
    long = minilm.embed_references([f"{filler} {tail}" for tail in tails])
    scores = minilm.embed_queries(["Which oil does the lamp burn?", "Who bakes the bread?"]) @ long.T
    assert scores.argmax(1).tolist() == [0, 1]
    assert (abs(scores[:, 0] - scores[:, 1]) > 0.02).all()


def test_a_text_that_fits_is_embedded_whole(minilm: SentenceTransformersEmbedder, minilm_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["ferry " * length for length in (1, 100, 253, 254)]
    plain = SentenceTransformer(str(minilm_path)).encode(texts, normalize_embeddings=True)
    assert minilm.embed_references(texts) == pytest.approx(plain, abs=1e-5)


def test_loading_and_embedding_print_nothing(
    minilm_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    SentenceTransformersEmbedder(minilm_path).embed_queries(["a"] * 100)
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == []


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere-at-all", "a/b/c", Path("x/y")])
def test_a_missing_folder_is_said_to_be_missing(path: str | Path) -> None:
    with pytest.raises(ConfigError, match="there is no model folder") as caught:
        SentenceTransformersEmbedder(path)
    assert str(path) in str(caught.value)


def test_a_hub_name_that_cannot_be_fetched() -> None:
    with pytest.raises(ConfigError, match="nobody/never-was is neither a folder nor a model") as caught:
        find_model("nobody/never-was", "sentence-transformers")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        SentenceTransformersEmbedder(tmp_path)
    assert "\n" not in str(caught.value)


def test_cut_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        SentenceTransformersEmbedder(copy)


def test_weights_that_are_not_finite(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    save_file(
        {
            name: torch.full_like(weight, torch.nan) if weight.is_floating_point() else weight
            for name, weight in weights.items()
        },
        copy / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ConfigError, match="without direction"):
        SentenceTransformersEmbedder(copy).embed_queries(["a"])


def test_batch_size_of_zero(minilm_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        SentenceTransformersEmbedder(minilm_path, batch_size=0)


def test_a_missing_package_names_the_extra(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # what Python itself keeps for a failed import
    SentenceTransformersEmbedder(copy)  # runs by torch alone
    pool_first_tokens(copy)
    with pytest.raises(PluginError, match=r"pip install 'm3runtime\[sentence-transformers\]'"):
        SentenceTransformersEmbedder(copy)


@pytest.mark.parametrize("absent", ["cuda:77", "nonsense"])
def test_a_device_that_this_machine_does_not_have(minilm_path: Path, absent: str) -> None:
    with pytest.raises(ConfigError, match=f"embedder.device: no device '{absent}'"):
        SentenceTransformersEmbedder(minilm_path, device=absent)


def test_fingerprint_samples_large_parameters_evenly() -> None:
    large = torch.zeros(3, 100_000)
    before = model_fingerprint([("w", large)], {}, [], {})
    assert model_fingerprint([("w", large.to(torch.bfloat16))], {}, [], {}) == before
    assert model_fingerprint([("w", large.T)], {}, [], {}) != before
    large[:, -6:] = 1
    assert model_fingerprint([("w", large)], {}, [], {}) != before


def test_unit_rows_of_huge_and_tiny_vectors() -> None:
    rows = np.array([[3e30, 4e30], [3e-30, 4e-30]], np.float32)
    assert unit_rows(rows, 2, "flag-embedding") == pytest.approx(np.array([[0.6, 0.8]] * 2), abs=1e-6)
    with pytest.raises(ConfigError, match="without direction"):
        unit_rows(np.zeros((1, 2), np.float32), 2, "flag-embedding")
