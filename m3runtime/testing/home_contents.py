"""The whole content of a home, to compare it with another's."""

from hashlib import sha256
from typing import Any

import numpy as np
import torch

from m3runtime.memory.block import Ids
from m3runtime.storage.home import Home
from m3runtime.testing.blocks import make_embeddings, make_reference
from m3runtime.testing.tier import check_read


def contents(home: Home) -> dict[str, Any]:
    """The content of a home as its methods report it, in comparable values."""
    ids = home.ids()
    out = torch.zeros((len(ids), home.slot_bytes), dtype=torch.uint8)
    found = home.read(ids, out)
    return {
        "ids": ids.tolist(),
        "found": found.tolist(),
        "blocks": out.tolist(),
        "references": home.references(ids),
        "embeddings": [(i.tolist(), v.tolist()) for i, v in home.embeddings()],
        "sources": dict(home.sources()),
        "states": dict(home.states()),
        "expiring": {day: ids.tolist() for day, ids in home.expiring().items()},
        "quarantined": dict(home.quarantined()),
        "cold": home.cold().tolist(),
        "manifest": home.get_meta("manifest"),
        "next_id": home.next_id(),
        "unused": home.unused(),
        "len": len(home),
    }


def digest(home: Home) -> str:
    """The digest of `contents`, 64 hex digits, to compare processes."""
    return sha256(repr(contents(home)).encode("utf-8", "surrogateescape")).hexdigest()


def check_whole(home: Home, ids: Ids) -> None:
    """Assert that everything about these ids is stored, and right."""
    assert check_read(home, ids).all()
    references = [make_reference(id) for id in ids.tolist()]
    assert home.references(ids) == references
    assert home.find([reference.text for reference in references]) == ids.tolist()
    for reference, id in zip(references, ids.tolist(), strict=True):
        assert id in home.ids_of(reference.source)
    batches = list(home.embeddings(ids))
    assert np.concatenate([some for some, _ in batches]).tolist() == ids.tolist()
    assert np.array_equal(np.concatenate([vectors for _, vectors in batches]), make_embeddings(ids))
