"""Configurations that are meant to do harm: refused in one line, or read as what they say."""

from functools import partial

import pytest

from m3runtime.config.schema import Config
from tests.end_to_end.commands import Place
from tests.hostile.cases import Case, check
from tests.hostile.nursery import Nursery

REFUSED = "^refused: ConfigError: "


def write(place: Place, text: str | bytes) -> None:
    place.file.write_bytes(text if isinstance(text, bytes) else text.encode())


def read(place: Place) -> str:
    try:
        Config.load(place.file, environ={})
    finally:
        assert not (place.folder / "marker").exists()
    return "read"


def configuration(text: str | bytes, expected: str = REFUSED) -> Case:
    return Case(partial(write, text=text), expected, act=read)


def laughs(levels: int, width: int = 10, mapping: bool = False) -> str:
    """Each level names the one before it ten times."""
    lines = ["bank: ./bank", "a0: &a0 lol"]
    for level in range(1, levels):
        below = f"*a{level - 1}"
        inner = [f"k{i}: {below}" for i in range(width)] if mapping else [below] * width
        lines.append(f"a{level}: &a{level} {'{' if mapping else '['}{', '.join(inner)}{'}' if mapping else ']'}")
    return "\n".join(lines)


MERGES = "\n".join(
    ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}], k{i}: 1}}" for i in range(1, 10)]
)
TAGS = (
    "!!python/object/apply:os.system ['touch marker']",
    "!!python/object/apply:pathlib.Path.touch [marker]",
    "!!python/name:os.system ''",
    "!!python/module:os ''",
    "!!python/object/new:os.system ['touch marker']",
    "!!binary aGVsbG8=",
    "!!float .nan",
    "!unknown x",
)

CASES: dict[str, Case] = {
    "laughs, a billion": configuration(laughs(10)),
    "laughs in mappings, a billion": configuration(laughs(10, mapping=True)),
    "laughs, two to the hundredth": configuration(laughs(100, width=2)),
    "laughs where options go": configuration(laughs(10) + "\ncodec: {kind: product, bytes: *a9}"),
    "laughs by merging": configuration(MERGES),
    "an anchor within itself": configuration("bank: &a [*a]"),
    "a mapping within itself": configuration("&a bank: &b {bank: *b}"),
    "deep lists": configuration("bank: " + "[" * 20_000 + "]" * 20_000),
    "deep mappings": configuration("bank: " + "{a: " * 20_000 + "}" * 20_000),
    "deep blocks": configuration("bank:\n" + "\n".join(" " * i + "a:" for i in range(2_000))),
    "64 MiB of one text": configuration(b"bank: " + b"x" * (64 << 20)),
    "64 MiB of lines": configuration(b"- x\n" * (16 << 20)),
    "64 MiB of zeros": configuration(bytes(64 << 20)),
    "a number of a million digits": configuration("recall: {memories: " + "9" * 1_000_000 + "}"),
    "a number in base 60": configuration("recall: {memories: " + "1:" * 100_000 + "1}"),
    "no UTF-8": configuration(b"bank: \xff\xfe"),
    "UTF-16": configuration("bank: x".encode("utf-16")),
    "control characters": configuration("bank: \x00\x1b[2J"),
    "a list": configuration("- bank"),
    "two documents": configuration("bank: a\n---\nbank: b"),
    "a key that is a mapping": configuration("? {a: b}\n: c"),
    "a key that is null": configuration("null: 1"),
    "a merge of text": configuration("<<: text"),
}
for tag in TAGS:
    CASES[f"tag {tag}"] = configuration(f"bank: {tag}", f"{REFUSED}|^read$")


@pytest.mark.parametrize("name", CASES)
def test_configuration(nursery: Nursery, name: str) -> None:
    check(nursery, __name__, CASES, name)
