"""Peak memory of writing a corpus: ``python -m tests.end_to_end.write_memory 1GB``. `test_write_memory` runs it.

Makes one text file of that size, catalogues it with a tiny model into a new bank, and prints JSON. In MB, up to the
last split, up to the last commit, and of all with the index: ``peak`` is resident memory,
``own`` is that without mapped pages of files. Of the difference to a small corpus, the index takes a part: about
300 bytes for each reference, with embeddings of 16 numbers.
"""

import json
import random
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.documents.reading import read_documents
from m3runtime.retrieval.embedder import Embedder, Embeddings
from m3runtime.writing.writer import Writer
from tests.model.families import make_model

UNITS = {"MB": 10**6, "GB": 10**9}
WORDS = ("the", "harbour", "lamp", "of", "old", "town", "burns", "walnut", "oil", "and", "turns", "once", "an", "hour")


class Digests(Embedder):
    """Embeds a text by its digest: a direction at random, and no work."""

    def __init__(self, path: str) -> None:
        self.name = path

    @property
    def dim(self) -> int:
        return 16

    @property
    def fingerprint(self) -> str:
        return "d" * 32

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        digests = b"".join(blake2b(text.encode(), digest_size=16).digest() for text in texts)
        vectors = np.frombuffer(digests, np.uint8).reshape(len(texts), 16) - np.float32(127.5)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        return self.embed_references(texts)


def make_text(path: Path, size: int) -> None:
    """A file of numbered paragraphs, no two alike, each one reference."""
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS, k=12)) + "." for _ in range(1000)]
    written = number = 0
    with path.open("w") as file:
        while written < size:
            number += 1
            written += file.write(f"House {number}. {' '.join(rng.choices(sentences, k=60))}\n\n")


class Watch:
    """A thread that notes the most memory that this process had of its own, without mapped pages of files."""

    def __init__(self) -> None:
        self.most = 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            self.most = max(self.most, int(status.split("RssAnon:")[1].split()[0]) / 1e3)
            time.sleep(0.02)


def peak() -> float:
    """Peak resident memory of this process, in MB (10**6 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main(size: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model("llama").save_pretrained(folder / "model")
        tokenizer = Tokenizer(WordLevel({word: id for id, word in enumerate(("<s>", "?", *WORDS))}, unk_token="?"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder / "model")
        make_text(folder / "corpus.txt", int(float(size[:-2]) * UNITS[size[-2:]]))
        config = Config.model_validate(
            {
                "bank": folder / "bank",
                "model": {"path": str(folder / "model"), "device": "cpu"},
                "memory": {"reference_tokens": 1024},
                "codec": {"kind": "scalar"},
                "embedder": {"kind": "tests.end_to_end.write_memory:Digests", "path": "digests"},
                "tiers": [{"kind": "lmdb", "durability": "relaxed"}],
            }
        )
        adapter = assembly.open_adapter(config)
        found: dict[str, object] = {"size": size, "before": peak()}
        watch, began = Watch(), time.perf_counter()

        def progress(_: str, done: int, total: int) -> None:
            for moment, there in (("split", not done), ("written", done == total)):
                if there:
                    found[moment] = {"peak": peak(), "own": watch.most, "seconds": time.perf_counter() - began}

        documents = read_documents([folder / "corpus.txt"])
        writer = Writer(config, adapter, assembly.open_embedder(config))
        report = writer.write(documents, catalogue=True, progress=progress)
        found |= {"peak": peak(), "own": watch.most, "references": report.catalogued, "seconds": report.seconds}
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
