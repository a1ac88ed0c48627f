"""No pickle is ever loaded: not by our sources, and not from where a bank's files are."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from m3runtime.bank.codecs import CODEC
from tests.end_to_end.commands import REPOSITORY, Place
from tests.hostile import test_codec_file, test_index_file
from tests.hostile.cases import spoiled
from tests.hostile.nursery import Nursery

PACKAGES = ("m3runtime", "backends", "model", "demo")
MODULES = {"yaml", "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
CALLS = {
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "pandas.read_pickle",
    "pd.read_pickle",
    "eval",
    "exec",
    "__import__",
}
SAFE_YAML = {"", "rt", "safe"}
"""The kinds of ruamel.yaml's `YAML` that make nothing but plain values."""


def offences(source: str) -> Iterator[str]:
    """What in a module may load a pickle, or run what it read."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] != ["UnpicklingError"]:
            names = [node.module or ""]
        yield from (f"line {node.lineno}: import {name}" for name in names if name.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            arguments = {word.arg: ast.unparse(word.value) for word in node.keywords}
            yaml_kind = arguments.get("typ", ast.unparse(node.args[0]) if node.args else "").strip("'")
            if called in CALLS or (called == "YAML" and yaml_kind not in SAFE_YAML):
                yield f"line {node.lineno}: {ast.unparse(node)}"
            for word in ("allow_pickle", "trust_remote_code"):
                if arguments.get(word, "False") != "False":
                    yield f"line {node.lineno}: {word}"
            if arguments.get("weights_only", "True") != "True":
                yield f"line {node.lineno}: weights_only"


def test_no_source_loads_a_pickle() -> None:
    files = [file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py")]
    assert len(files) > 100
    assert {str(file): found for file in files if (found := list(offences(file.read_text("utf-8"))))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "import yaml",
        "YAML(typ='unsafe')",
        "YAML(typ=['unsafe', 'pytypes'])",
        "YAML('full')",
        "model(weights_only=False)",
        "eval(text)",
    ],
)
def test_what_would_be_found(source: str) -> None:
    assert list(offences(source))


def unmarked(place: Place, which: tuple[str, str]) -> str:
    """Put a pickle that makes a file where a bank's file is, and serve the bank."""
    ended = spoiled(place, which)
    for command in (["inspect"], ["search", "owl"], ["verify"], ["codec", "report", str(place.bank / CODEC)]):
        place.m3(*command)
    assert not (place.folder / "marker").exists(), "the pickle was loaded"
    return ended


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (test_codec_file.__name__, "a pickle"),
        (test_codec_file.__name__, "a file of torch"),
        (test_index_file.__name__, "a pickle"),
        (test_index_file.__name__, "a pickle in a file of numpy"),
    ],
)
def test_a_pickle_in_place_of_a_file_is_not_loaded(nursery: Nursery, module: str, name: str) -> None:
    ended = nursery.run("tests.hostile.test_no_pickle:unmarked", [module, name])
    assert ended.how == "returned", ended.text


def test_the_pickle_would_leave_its_mark(tmp_path: Path) -> None:
    import pickle

    from tests.hostile.test_codec_file import a_pickle

    place = Place(tmp_path)
    (place.bank).mkdir()
    (place.bank / CODEC).touch()
    a_pickle(place)
    assert not (tmp_path / "marker").exists()
    pickle.loads((place.bank / CODEC).read_bytes())
    assert (tmp_path / "marker").exists()
