"""A small bank of everything, what a server delivers of it, and whether that is what it delivered before."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash

from m3runtime import assembly
from m3runtime.bank.bank import Bank
from m3runtime.bank.manifest import Manifest
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.config.schema import Config
from m3runtime.documents import reference as documents
from m3runtime.documents.reference import Reference
from m3runtime.errors import M3Error
from m3runtime.memory import block
from m3runtime.memory.spec import MemorySpec
from m3runtime.runtime import Runtime
from m3runtime.storage.home import Batch
from m3runtime.testing.codec import make_memories
from tests.end_to_end.commands import Place

T = TypeVar("T")
SPEC = MemorySpec(layers=(0, 1, 3), kv_heads=2, tokens=40, head_dim=16, reference_tokens=40, dtype="float32")
WORDS = "harbour lamp walnut oil keeper dusk ferry crossing loaves quarry granite heron abbey owl library bell"
FORGOTTEN = (3, 11)
COUNT = 20
QUERIES = ("lamp oil of the harbour", "granite quarry", "an owl", "keeper 4")
DIM = 64


def configure(place: Place) -> None:
    """Write the configuration, with paths inside of the place only."""
    place.folder.mkdir(parents=True, exist_ok=True)
    place.configure(
        bank="./bank",
        model={"path": "none"},
        codec={"kind": "product"},
        embedder={"kind": "tests.end_to_end.embedders:HashedWords", "path": "hashed", "dim": DIM},
        tiers=[{"kind": "pinned", "capacity": "1MiB"}, {"kind": "lmdb", "compression": "zstd"}],
        recall={"min_score": 0.0, "when_late": "wait", "memories": 8},
    )


def make_reference(id: int, salt: str = "") -> Reference:
    """Of words that the queries share."""
    words = WORDS.split()
    text = f"{salt}Keeper {id}: {words[id % 16]} {words[id * 5 % 16]} {words[id * 7 % 16]}, page {id}."
    return Reference(
        text, 1 + 3 * id % SPEC.tokens, places=(documents.Place(f"notes/{id % 4}.md", id, id + len(text)),)
    )


def make_bank(place: Place, salt: str = "", seed: int = 0) -> None:
    """A bank of `COUNT` memories less `FORGOTTEN`, short and long ones, some of which compress, and its index."""
    configure(place)
    config = Config.load(place.file, environ={})
    codec = ProductCodec(SPEC)
    codec.fit(make_memories([SPEC.tokens] * 12, seed=seed, spec=SPEC))
    embedder = assembly.open_embedder(config)
    manifest = Manifest(
        model=f"{seed:032x}",
        model_name="tiny",
        tokenizer="0d" * 16,
        sink="<s>",
        spec=SPEC,
        codec_kind="product",
        codec_options=codec.options,
        codec=codec.fingerprint,
        embedder=embedder.fingerprint,
        embedder_name="hashed",
        dim=embedder.dim,
    )
    place.bank.mkdir()
    bank = Bank.create(place.bank, assembly.open_home(config), manifest, codec)
    with contextlib.closing(bank):
        for first in range(0, COUNT, 5):
            ids = np.arange(first, first + 5, dtype=np.uint64)
            references = [make_reference(int(id), salt) for id in ids]
            memories = make_memories([one.tokens for one in references], seed=seed + first, spec=SPEC)
            memories.keys[::2] = memories.keys[::2, :, :, :1]  # codes that repeat are compressed
            memories.values[::2] = memories.values[::2, :, :, :1]
            vectors = embedder.embed_references([one.text for one in references])
            bank.home.commit(Batch(ids, bank.blocks(ids, memories), references, vectors))
        bank.home.discard(np.array(FORGOTTEN, np.uint64))
        assembly.bank_index(config, bank).update()


@dataclass(frozen=True)
class Delivered:
    """All that a bank gave, as digests; what it did not give is not there."""

    blocks: Mapping[str, str]
    memories: Mapping[str, str]
    references: Mapping[str, Any]
    embeddings: Mapping[str, str]
    scores: Mapping[str, Mapping[str, float]]
    recalled: Mapping[str, Any]
    """For the first of `QUERIES`."""
    found: Mapping[str, int]
    sources: Mapping[str, int]
    next_id: int
    manifest: str

    @classmethod
    def of(cls, text: str) -> "Delivered":
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def serve(place: Place) -> Delivered:
    """What a server of this bank does, from opening it to handing memories to attention. Writes nothing."""
    with Runtime.open(Config.load(place.file, environ={}), read_only=True) as runtime:
        home = runtime.bank.home
        ids = home.ids()
        slots = torch.empty(len(ids), home.slot_bytes, dtype=torch.uint8)
        found = runtime.hierarchy.read(ids, slots)
        rows = slots.numpy()
        there = zip(ids[found], rows[found], strict=True)
        blocks = {str(id): _digest(row[: block.length(row)]) for id, row in there}
        memories = {
            str(id): _digest(torch.stack(part).numpy()) for id, part in runtime.fetch(ids[found], torch.float32).items()
        }
        references = dict(zip(ids.tolist(), each(home.references, ids), strict=True))
        embeddings = {}
        for id in ids:
            for _, vectors in attempt(lambda id=id: list(home.embeddings(np.array([id], np.uint64)))) or []:
                embeddings[str(id)] = _digest(vectors)
        scores = {}
        for query, matches in zip(QUERIES, runtime.search(QUERIES, k=COUNT), strict=True):
            scores[query] = {str(match.id): match.score for match in matches}
        stream = runtime.stream()
        chosen = stream.recall(QUERIES[0])
        recalled = {
            str(id): [score, _plain(reference), _digest(torch.stack(part).numpy())]
            for id, score, reference, part in zip(
                chosen.ids, chosen.scores, chosen.references, chosen.parts, strict=True
            )
        }
        stream.close()
        texts = [make_reference(id).text for id in range(COUNT)]
        found_ids = dict(zip(texts, each(home.find, texts), strict=True))
        return Delivered(
            blocks,
            memories,
            {str(id): _plain(one) for id, one in references.items() if one is not None},
            embeddings,
            scores,
            recalled,
            {text: id for text, id in found_ids.items() if id is not None},
            dict(attempt(home.sources) or {}),
            attempt(home.next_id) or 0,
            _digest(runtime.bank.manifest.to_bytes()),
        )


def differs(before: Delivered, now: Delivered) -> str | None:
    """What was delivered now, and was not so before. Less than before is no such thing."""
    for name in ("blocks", "memories", "references", "embeddings", "found"):
        was, is_now = getattr(before, name), getattr(now, name)
        for key, value in is_now.items():
            if was.get(key) != value:
                return f"{name} of {key}: {value}, not {was.get(key)}"
    for query, chosen in now.scores.items():
        for id, score in chosen.items():
            if before.scores[query].get(id) != score:
                return f"score of {id} for {query!r}: {score}, not {before.scores[query].get(id)}"
    for id, given in now.recalled.items():  # where one is gone another came in
        whole = [before.scores[QUERIES[0]].get(id), before.references.get(id), before.memories.get(id)]
        if given != whole:
            return f"{id} was recalled as {given}, not {whole}"
    for source, count in now.sources.items():
        if count > before.sources.get(source, 0):
            return f"source {source!r} has {count} references"
    if now.next_id not in (0, before.next_id):
        return f"the next id is {now.next_id}, not {before.next_id}"
    return None if now.manifest == before.manifest else "the manifest is another"


def _digest(what: Any) -> str:
    return xxhash.xxh3_128_hexdigest(what if isinstance(what, bytes) else np.ascontiguousarray(what).tobytes())


def each(work: Callable[[Any], Sequence[T]], items: Any) -> list[T | None]:
    """The results for all items, None where there is a typed error about one."""
    together = attempt(lambda: work(items))
    if together is not None:
        return list(together)
    return [None if (one := attempt(lambda i=i: work(items[i : i + 1]))) is None else one[0] for i in range(len(items))]


def attempt(work: Callable[[], T]) -> T | None:
    """The result, or None for a typed error about this one thing."""
    try:
        return work()
    except M3Error:
        return None


def _plain(reference: Reference) -> Any:
    """A reference as JSON has it: places are a list."""
    return json.loads(json.dumps(asdict(reference)))
