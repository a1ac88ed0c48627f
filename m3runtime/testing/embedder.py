"""`EmbedderContract`: the laws of every `Embedder`."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from m3runtime.retrieval.embedder import Embedder, Embeddings

MakeEmbedder = Callable[[], Embedder]
"""Makes an embedder: always an equal one, loaded anew."""

TEXTS = (
    "The harbour lamp burns walnut oil.",
    "Ferry",
    "",
    " \n\t ",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 東京都 😀",
    "A text of many words. " * 12,
    "The ferry sails to the village of Uskerfold; the crossing takes 55 minutes.",
    "The ferry sails to the village of Uskerfold; the crossing takes 56 minutes.",
)


class EmbedderContract:
    """Laws of `Embedder`. A subclass has a fixture ``make_embedder`` of scope ``class``.

    ::

        class TestMine(EmbedderContract):
            @pytest.fixture(scope="class")
            @staticmethod
            def make_embedder() -> MakeEmbedder:
                return lambda: MyEmbedder("path")
    """

    tolerance = 1e-5
    """The tolerance for elements of a text's vector when other texts are embedded in the same call."""

    @pytest.fixture(scope="class")
    @staticmethod
    def embedder(make_embedder: MakeEmbedder) -> Embedder:
        """One embedder for all tests of a class: making one may take seconds."""
        return make_embedder()

    @staticmethod
    def both(embedder: Embedder, texts: list[str]) -> list[Embeddings]:
        """The texts as references and as queries."""
        return [embedder.embed_references(texts), embedder.embed_queries(texts)]

    def test_vectors_are_finite_and_of_length_one(self, embedder: Embedder) -> None:
        for vectors in self.both(embedder, list(TEXTS)):
            assert vectors.dtype == np.float32
            assert vectors.shape == (len(TEXTS), embedder.dim)
            assert np.isfinite(vectors).all()
            assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)

    def test_no_texts_give_no_vectors(self, embedder: Embedder) -> None:
        for vectors in self.both(embedder, []):
            assert vectors.dtype == np.float32
            assert vectors.shape == (0, embedder.dim)

    def test_the_same_call_gives_the_same_vectors(self, embedder: Embedder) -> None:
        for once, again in zip(self.both(embedder, list(TEXTS)), self.both(embedder, list(TEXTS)), strict=True):
            assert np.array_equal(once, again)

    def test_a_text_has_one_vector_in_any_company(self, embedder: Embedder) -> None:
        together = self.both(embedder, list(TEXTS))
        for row, text in enumerate(TEXTS):
            for batch, alone in zip(together, self.both(embedder, [text]), strict=True):
                assert alone[0] == pytest.approx(batch[row], abs=self.tolerance)

    def test_rows_are_in_the_order_of_the_texts(self, embedder: Embedder) -> None:
        many = [f"{number} " + "word " * (number % 5) for number in range(40)]
        for forth, back in zip(self.both(embedder, many), self.both(embedder, many[::-1]), strict=True):
            assert back[::-1] == pytest.approx(forth, abs=self.tolerance)

    def test_hundreds_of_texts_and_some_twice(self, embedder: Embedder) -> None:
        for many, once in zip(
            self.both(embedder, [TEXTS[number % 5] for number in range(300)]),
            self.both(embedder, list(TEXTS[:5])),
            strict=True,
        ):
            assert many.shape == (300, embedder.dim)
            assert many == pytest.approx(np.tile(once, (60, 1)), abs=self.tolerance)

    def test_vectors_are_the_caller_s(self, embedder: Embedder) -> None:
        kept = [vectors.copy() for vectors in self.both(embedder, list(TEXTS))]
        for vectors in self.both(embedder, list(TEXTS)):
            vectors[:] = 0
        for vectors, before in zip(self.both(embedder, list(TEXTS)), kept, strict=True):
            assert np.array_equal(vectors, before)

    def test_different_texts_differ_and_equal_ones_agree(self, embedder: Embedder) -> None:
        for vectors in self.both(embedder, [TEXTS[0], TEXTS[1], TEXTS[0]]):
            assert vectors[0] == pytest.approx(vectors[2], abs=self.tolerance)
            assert vectors[0] @ vectors[1] < 1 - 1e-4

    def test_a_very_long_text(self, embedder: Embedder) -> None:
        texts = ["word " * 10_000, "character" * 5_000]
        for vectors in (embedder.embed_references(texts), embedder.embed_queries(texts[1:])):
            assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)

    def test_another_one_has_the_same_fingerprint_and_vectors(
        self, embedder: Embedder, make_embedder: MakeEmbedder
    ) -> None:
        other = make_embedder()
        assert other.fingerprint == embedder.fingerprint
        assert len(bytes.fromhex(other.fingerprint)) == 16
        texts = list(TEXTS)
        for one, two in zip(self.both(embedder, texts), self.both(other, texts), strict=True):
            assert two == pytest.approx(one, abs=self.tolerance)
        other.close()
        other.close()

    def test_threads(self, embedder: Embedder) -> None:
        batches = [list(TEXTS[number % 4 : number % 4 + 1 + number % 3]) for number in range(8)]
        for embed in (embedder.embed_references, embedder.embed_queries):
            expected = [embed(texts) for texts in batches]
            with ThreadPoolExecutor(4) as pool:
                for vectors, wanted in zip(pool.map(embed, batches), expected, strict=True):
                    assert vectors == pytest.approx(wanted, abs=self.tolerance)
