"""Commands on hostile banks: each says in one line what is wrong, or does what it should; none falls over."""

from importlib import import_module

import pytest

from tests.end_to_end.commands import Place
from tests.hostile import (
    test_blocks,
    test_codec_file,
    test_home_files,
    test_index_file,
    test_manifest,
    test_records,
    test_yaml,
)
from tests.hostile.cases import MOST_BYTES, Case
from tests.hostile.nursery import Nursery

COMMANDS = (
    ["inspect"],
    ["search", "owl"],
    ["verify"],
    ["codec", "report", "bank/codec.safetensors"],
    ["verify", "--repair"],
    ["verify"],
    ["forget", "0"],
)
CHOSEN = {
    test_blocks: (
        "nothing done",
        "without its last byte",
        "swapped with another",
        "8 GiB that say nothing",
        "no tokens",
    ),
    test_codec_file: (
        "a pipe",
        "a hole of 100 GB",
        "a link to zeros without end",
        "a spec of more heads",
        "another kind",
    ),
    test_index_file: (
        "a pipe",
        "a folder",
        "a hole of 100 GB behind it",
        "2^32 - 1 rows",
        "zeros and a record that fits",
    ),
    test_manifest: ("gone", "deep JSON", "2^40 heads", "a model's name with lines", "format 2"),
    test_records: (
        "references: a bit flipped in the middle",
        "an embedding of NaN",
        "no members",
        "home: emptied",
        "slots of 2^32 bytes",
        "meta: emptied",
        "set apart for a reason of many lines",
    ),
    test_home_files: ("zeros", "half of its pages", "1 TB of holes", "data.mdb is a pipe", "scribble 3", "scribble 4"),
    test_yaml: ("laughs, a billion", "64 MiB of lines", "deep mappings", "a list"),
}


def commanded(place: Place, which: tuple[str, str]) -> str:
    """Spoil the bank and run every command. Returns their exit codes."""
    module, name = which
    case: Case = import_module(module).CASES[name]
    case.spoil(place)
    codes = []
    for command in COMMANDS:
        result = place.m3(*command)
        codes.append(result.code)
        assert result.code in (0, 1, 2), (command, result)
        if result.code == 2 and command[0] != "verify":  # which writes a report
            assert result.complaint
        assert "Traceback" not in result.err, (command, result.err)
        assert "\x1b[2J" not in result.out + result.err, (command, result)
    return str(codes)


@pytest.mark.parametrize(
    ("module", "name"), [(module.__name__, name) for module, names in CHOSEN.items() for name in names]
)
def test_commands(nursery: Nursery, module: str, name: str) -> None:
    ended = nursery.run("tests.hostile.test_commands:commanded", [module, name], 60.0)
    assert ended.how == "returned", ended.text
    assert ended.peak_bytes < MOST_BYTES, f"{ended.peak_bytes >> 20} MiB"
    if name == "nothing done":
        assert ended.text == "[0, 0, 0, 0, 0, 0, 0]"
