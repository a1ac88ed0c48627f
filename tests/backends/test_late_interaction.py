"""Late interaction keeps the laws of rerankers, and compares word by word what an embedder compares as a whole."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from m3backends.rerankers.late_interaction import LateInteractionReranker
from m3runtime.errors import ConfigError
from m3runtime.testing.reranker import MakeReranker, RerankerContract

pytestmark = pytest.mark.real_model


class TestLateInteraction(RerankerContract):
    @pytest.fixture(scope="class")
    @staticmethod
    def make_reranker(minilm_path: Path) -> MakeReranker:
        return lambda: LateInteractionReranker(minilm_path)


def test_a_text_scores_highest_for_its_own_words(minilm_path: Path) -> None:
    reranker = LateInteractionReranker(minilm_path)
    texts = ["The ferry to Uskerfold takes 55 minutes.", "The ferry to Uskerfold takes 75 minutes."]
    for question in texts:
        scores = dict(zip(texts, reranker.score(question, texts).tolist(), strict=True))
        assert scores[question] == pytest.approx(1, abs=1e-3)
        assert max(scores, key=lambda text: scores[text]) == question


def test_a_text_without_words_scores_half_of_the_cosine(minilm_path: Path) -> None:
    reranker = LateInteractionReranker(minilm_path)
    assert reranker.score("", [""])[0] == pytest.approx(0.5, abs=1e-6)
    assert reranker.score("  ", ["a word"])[0] <= 0.5


def test_texts_that_are_not_kept_are_read_again(minilm_path: Path) -> None:
    texts = [f"The lamp of hall {number} burns oil." for number in range(5)]
    few, many = LateInteractionReranker(minilm_path, kept=2), LateInteractionReranker(minilm_path)
    for _ in range(2):
        assert np.array_equal(few.score("Which lamp?", texts), many.score("Which lamp?", texts))
    assert list(few._texts) == texts[-2:]


@pytest.mark.slow  # imports the library
def test_the_library_reads_the_same_tokens(minilm_path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(minilm_path, tmp_path / "copy")
    (copy / "1_Pooling/config.json").write_text(
        json.dumps({"word_embedding_dimension": 384, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    ours, library = LateInteractionReranker(minilm_path), LateInteractionReranker(copy)
    text = "The harbour lamp burns walnut oil."
    for one in (ours, library):
        one.score("What does it burn?", [text])
    assert ours._texts[text].tokens.shape == library._texts[text].tokens.shape
    assert ours._texts[text].tokens == pytest.approx(library._texts[text].tokens, abs=2e-3)


def test_what_cannot_be_a_reranker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reranker late-interaction: there is no model folder"):
        LateInteractionReranker(tmp_path / "none")
    with pytest.raises(ConfigError, match="reranker late-interaction: kept must be at least 1"):
        LateInteractionReranker(tmp_path / "none", kept=0)
