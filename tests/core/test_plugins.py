import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from m3runtime.config.units import Seconds, Size
from m3runtime.errors import ConfigError, PluginError
from m3runtime.plugins import loading as plugins
from m3runtime.plugins.construction import construct
from m3runtime.plugins.loading import available, load

if TYPE_CHECKING:
    from torch import device

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
Install = Callable[..., None]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    plugins._entries.cache_clear()
    yield
    plugins._entries.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes as if a package with these entry points and modules were installed."""

    def install(entries: dict[str, dict[str, str]], package: str = "fake", **modules: str) -> None:
        folder = tmp_path / package
        info = folder / f"{package}-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        lines = [
            line
            for group, names in entries.items()
            for line in (f"[{group}]", *(f"{n} = {v}" for n, v in names.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for name, source in modules.items():
            (folder / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(folder)
        plugins._entries.cache_clear()

    return install


@pytest.fixture
def own(install: Install) -> dict[str, dict[str, str]]:
    """m3runtime's own entry points, as they are in a checkout that is not installed, too."""
    entries: dict[str, dict[str, str]] = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]
    install(entries)
    return entries


def test_own_plug_ins_are_found_and_are_what_they_are_called(own: dict[str, dict[str, str]]) -> None:
    for group in ("tiers", "codecs"):
        names = own[f"m3runtime.{group}"]
        assert set(names) <= set(available(group))
        for name, value in names.items():
            kind = load(group, name)
            assert f"{kind.__module__}:{kind.__name__}" == value


def test_every_group_has_entry_points(own: dict[str, dict[str, str]]) -> None:
    assert {f"m3runtime.{group}" for group in plugins._GROUPS} == set(own)


def test_a_class_is_loaded_by_its_import_path() -> None:
    assert load("tiers", "pathlib:PurePath") is __import__("pathlib").PurePath
    assert load("tiers", "m3runtime.errors:M3Error") is __import__("m3runtime.errors").errors.M3Error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pinnd", "tier pinnd is not known; did you mean pinned? There are "),
        ("zzzzzz", "tier zzzzzz is not known; There are "),
        ("pathlib:Nothing", "tier pathlib:Nothing: module pathlib has no Nothing"),
        ("pathlib:", "tier pathlib: is not an import path such as package.module:Name"),
        (":Name", "tier :Name is not an import path"),
        (".x:Name", "tier .x:Name is not an import path"),
        ("os:getcwd", "tier os:getcwd: os:getcwd is not a class"),
        ("my_tiers:T", "tier my_tiers:T: no module my_tiers; is its folder on PYTHONPATH?"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(own: dict[str, dict[str, str]], name: str, message: str) -> None:
    with pytest.raises(PluginError) as caught:
        load("tiers", name)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ModuleNotFoundError(name='faiss')", "needs faiss: pip install 'm3runtime[train]'"),
        ("raise ModuleNotFoundError(name='gguf.quants')", "needs gguf: pip install 'm3runtime[transformers]'"),
        (
            "raise ModuleNotFoundError(name='sentence_transformers')",
            "needs sentence_transformers: pip install 'm3runtime[sentence-transformers]'",
        ),
        ("raise ModuleNotFoundError(name='FlagEmbedding')", "needs FlagEmbedding: pip install 'm3runtime[bge]'"),
        ("import redis_of_nobody", "needs redis_of_nobody, which is not installed"),
        ("from os import nothing", "cannot be imported: cannot import name 'nothing' from 'os'"),
    ],
)
def test_a_missing_dependency_is_named(install: Install, source: str, message: str, request: Any) -> None:
    module = f"broken_{abs(hash(request.node.name))}"
    install({"m3runtime.embedders": {"broken": f"{module}:Embedder"}}, **{module: source})
    with pytest.raises(PluginError) as caught:
        load("embedders", "broken")
    assert str(caught.value).startswith(f"embedder broken {message}")


def test_a_name_that_two_packages_provide_is_refused(install: Install) -> None:
    install({"m3runtime.tiers": {"twin": "a:T"}}, "one")
    install({"m3runtime.tiers": {"twin": "b:T"}}, "two")
    with pytest.raises(PluginError, match="tier twin is provided twice; use an import path: a:T or b:T"):
        load("tiers", "twin")


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    with pytest.raises(PluginError, match="no tier is installed, so not even m3runtime's own"):
        load("tiers", "gpu")


class Thing:
    def __init__(self, *, slot_bytes: int, capacity: Size, eviction: str = "lru", shares: float | None = None) -> None:
        self.all = (slot_bytes, capacity, eviction, shares)


class Anything:
    def __init__(self, path: str, **more: Any) -> None:
        self.all = {"path": path, **more}


def test_options_are_read_as_what_the_constructor_takes() -> None:
    thing = construct(Thing, {"capacity": "1KiB", "shares": 1}, "tiers.0", slot_bytes=8)
    assert thing.all == (8, 1024, "lru", 1.0)


class Cache:
    """A plug-in with names of its own, one of them of a type that only type checkers import."""

    def __init__(
        self, *, budget: "Size", patience: "Seconds" = 1.0, limit: "Size | None" = None, device: "device | None" = None
    ) -> None:
        self.all = (budget, patience, limit, device)


def test_sizes_and_times_are_read_by_their_annotation_whatever_they_are_called() -> None:
    options = {"budget": "2GiB", "patience": "50ms", "limit": "1KiB", "device": "2GiB"}
    assert construct(Cache, options, "tiers.0").all == (2 * 1024**3, 0.05, 1024, "2GiB")
    assert construct(Cache, {"budget": 7, "limit": None}, "tiers.0").all == (7, 1.0, None, None)
    with pytest.raises(ConfigError, match=r"^tiers\.0\.limit must be a size such as 512MiB, .*, not 'much'$"):
        construct(Cache, {"budget": 7, "limit": "much"}, "tiers.0")


def test_a_constructor_that_takes_anything_gets_it() -> None:
    assert construct(Anything, {"path": "x", "color": [1]}, "embedder").all == {"path": "x", "color": [1]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 1, "evicton": "lru"}, "tiers.0.evicton is not known; did you mean tiers.0.eviction?"),
        ({"capacity": 1, "zzz": 1}, "tiers.0.zzz is not known; known are capacity, eviction, shares"),
        ({"capacity": 1, "slot_bytes": 9}, "tiers.0.slot_bytes is not known; known are capacity, eviction, shares"),
        ({}, "tiers.0.capacity is missing"),
        ({"capacity": "big"}, "tiers.0.capacity must be a size such as"),
        ({"capacity": 1, "eviction": False}, "tiers.0.eviction must be a valid string, not False"),
        (
            {"capacity": 1, "shares": "x"},
            "tiers.0.shares must be a valid number, unable to parse string as a number, not 'x'",
        ),
    ],
)
def test_wrong_options_are_said_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        construct(Thing, options, "tiers.0", slot_bytes=8)
    assert str(caught.value).startswith(message)
