"""A manifest that is not what it should be: nothing is imported, opened or allocated because it says so."""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.end_to_end.commands import Place
from tests.hostile import raw
from tests.hostile.banks import serve
from tests.hostile.cases import Case, check
from tests.hostile.nursery import Nursery

pytestmark = pytest.mark.long

REFUSED = "^refused: Bank(Format|Mismatch|Missing)?Error: "
DEEP = "[" * 100_000 + "]" * 100_000


def write(place: Place, work: Callable[[bytes], bytes]) -> None:
    """Another manifest, behind a seal that fits."""
    value = raw.get(place, "meta", b"manifest")
    start = value.index(b"{")
    new = work(value[start:])
    raw.put(place, "meta", b"manifest", raw.sealed("meta", b"manifest", new) if start else new)


def changed(work: Callable[[bytes], bytes], expected: str = REFUSED, **more: Any) -> Case:
    return Case(partial(write, work=work), expected, **more)


def fields(expected: str = REFUSED, **some: Any) -> Case:
    """Other values in the manifest. Where it is used as it is, its blocks are another bank's."""
    return changed(lambda text: json.dumps({**json.loads(text), **some}).encode(), expected, forged=True)


def spec(expected: str = REFUSED, **some: Any) -> Case:
    def work(text: bytes) -> bytes:
        stated = json.loads(text)
        return json.dumps({**stated, "spec": {**stated["spec"], **some}}).encode()

    return changed(work, expected)


def without(name: str) -> Case:
    return changed(lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != name}).encode())


def importable(place: Place, kind: str) -> None:
    """A module that leaves a file where it is imported, named as the codec."""
    marker = str(place.folder / "marker")
    place.text("marking.py", f"import pathlib\npathlib.Path({marker!r}).touch()\nclass Codec: ...\n")
    write(place, lambda text: json.dumps({**json.loads(text), "codec_kind": kind}).encode())


def unmarked(place: Place) -> str:
    """Serve it from the folder that has the module, which is what ``python -m`` would have on its path."""
    os.chdir(place.folder)
    sys.path.insert(0, str(place.folder))
    try:
        serve(place)
    finally:
        assert not (place.folder / "marker").exists(), "the module was imported"
        assert "marking" not in sys.modules
    return "served"


def unreadable(place: Place) -> None:
    """What no seal fits any more."""
    value = raw.get(place, "meta", b"manifest")
    raw.put(place, "meta", b"manifest", raw.flip(value, 8 * len(value) // 2))


def gone(place: Place) -> None:
    with raw.records(place, "meta") as (txn, _):
        assert txn.delete(b"manifest")


LESS = "^missing: .* 19$|^less$"
CASES: dict[str, Case] = {
    "nothing done": changed(lambda text: text, "^whole$"),
    "another order of keys": changed(
        lambda text: json.dumps(dict(reversed(json.loads(text).items()))).encode(), "^whole$"
    ),
    "gone": Case(gone, REFUSED),
    "flipped": Case(unreadable, REFUSED),
    "empty": changed(lambda text: b""),
    "no JSON": changed(lambda text: b"\xff\xfe{"),
    "half": changed(lambda text: text[: len(text) // 2]),
    "deep JSON": changed(lambda text: DEEP.encode()),
    "deep JSON in a field": changed(lambda text: text[:-1] + b',"more":' + DEEP.encode() + b"}"),
    "a list": changed(lambda text: b"[1]"),
    "a number": changed(lambda text: b"7"),
    "null": changed(lambda text: b"null"),
    "no fields": changed(lambda text: b"{}"),
    "an unknown field": fields(colour="red"),
    "16 MiB of a field": fields(colour="red" * (16 << 20)),
    "a key that is no name": fields(**{"\n": 1}),
    "format 0": fields(format=0),
    "format 2": fields(format=2),
    "format 3": fields(format=3),
    "headings in format 1": fields(headings=True),
    "headings that are a number": fields(format=3, headings=1),
    "format 2^64": fields(format=2**64),
    "a format of 400 digits": fields(format=10**400),
    "format NaN": fields(format=float("nan")),
    "a format of text": fields(format="1"),
    "no format": without("format"),
    "no codec": without("codec"),
    "no spec": without("spec"),
    "spec null": fields(spec=None),
    "a spec of text": fields(spec="dense"),
    "2^40 heads": spec(kv_heads=2**40),
    "2^40 channels": spec(head_dim=2**40),
    "2^40 tokens": spec(tokens=2**40, reference_tokens=2**40),
    "10^300 heads": spec(kv_heads=10**300),
    "a million layers": spec(layers=list(range(1_000_000))),
    "layer 2^40": spec(layers=[0, 1, 2**40]),
    "layers of text": spec(layers=["0", "1"]),
    "layers of one number": spec(layers=3),
    "no layers": spec(layers=[]),
    "heads of 2.0": spec(kv_heads=2.0),
    "heads of true": spec(kv_heads=True),
    "heads of NaN": spec(kv_heads=float("nan")),
    "tokens of text": spec(tokens="40"),
    "no tokens": spec(tokens=0),
    "-1 tokens": spec(tokens=-1),
    "another dtype": spec(dtype="float16"),
    "a dtype of torch": spec(dtype="__class__"),
    "an unknown part of the spec": spec(colour=1),
    "an embedding of 2^40 numbers": fields(f"{REFUSED}|{LESS}", dim=2**40),
    "an embedding of 10^30 numbers": fields(f"{REFUSED}|{LESS}", dim=10**30),
    "an embedding of a number less": fields(f"{REFUSED}|{LESS}", dim=63),
    "an embedding of none": fields(dim=0),
    "an embedding of 64.0": fields(dim=64.0),
    "another embedder": fields(embedder="0" * 32),
    "another codec": fields(codec="0" * 32),
    "a codec of other letters": fields(codec="z" * 32),
    "a codec of fewer letters": fields(codec="0a"),
    "a codec of 1 MiB": fields(codec="0" * (1 << 20)),
    "a codec with a line": fields(codec="0" * 31 + "\n"),
    "codec null": fields(codec=None),
    "another kind of codec": fields(codec_kind="scalar"),
    "a kind of codec that nobody knows": fields("^refused: (Bank|Plugin)", codec_kind="antigravity"),
    "a kind of codec that is a path": fields("^refused: (Bank|Plugin)", codec_kind="../../etc/passwd"),
    "a kind of codec with lines": fields("^refused: (Bank|Plugin)", codec_kind="a\nb"),
    "a kind of codec that is a list": fields(codec_kind=["product"]),
    "options that are a list": fields(codec_options=["bytes"]),
    "options of another kind": fields(f"^less$|{REFUSED}", codec_options={"colour": {"red": []}}),
    "a model's name that is a path": fields("^less$|^missing|^whole$", model_name="../../../../etc/passwd"),
    "a model's name of 16 MiB": fields(f"^less$|^missing|^whole$|{REFUSED}", model_name="x" * (16 << 20)),
    "a model's name with lines": fields(f"^less$|^missing|^whole$|{REFUSED}", model_name="a\n\x1b[2Jb"),
    "a model's name that is a number": fields(model_name=7),
    "another model": fields("^missing", model="0e" * 16),
    "an embedder's name that is a path": fields("^less$|^missing|^whole$", embedder_name="/dev/zero"),
    "a sink that is a list": fields(sink=[]),
    "a surrogate in the sink": fields(f"^missing|{REFUSED}", sink="\ud800"),
}
for kind in ("marking:Codec", "marking", "marking.Codec:Codec", "tests.hostile.marking:Codec", "os:system"):
    CASES[f"a codec to import from {kind}"] = Case(partial(importable, kind=kind), "^refused", act=unmarked)


@pytest.mark.parametrize("name", CASES)
def test_manifest(nursery: Nursery, name: str) -> None:
    check(nursery, __name__, CASES, name)
