import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.config.loading import LoadedConfig, load_config
from m3runtime.config.presets import ORIGIN, PRESETS
from m3runtime.config.schema import Config, MemoryConfig
from m3runtime.config.yaml_file import parse_yaml
from m3runtime.errors import ConfigError
from m3runtime.memory.shape import memory_spec
from m3runtime.writing.codec_files import configured
from tests.yaml_text import dumped

BARE = "bank: ./bank\nmodel: {path: owner/model}\n"
PRESET = BARE + "memory: {preset: memory3}\n"
GIVEN = {(section, key): value for section, ours in PRESETS["memory3"].items() for key, value in ours.items()}
"""The preset's value of each key."""
OTHER: dict[tuple[str, str], Any] = {
    ("memory", "layers"): "middle-half",
    ("memory", "tokens_per_head"): 4,
    ("memory", "reference_tokens"): 64,
    ("memory", "sink"): "Text:",
    ("memory", "place"): "turn",
    ("memory", "sinks"): "each",
    ("memory", "positions"): "sequential",
    ("memory", "attention_temperature"): 0.9,
    ("codec", "kind"): "raw",
    ("codec", "preset"): "mine",
    ("embedder", "kind"): "sentence-transformers",
    ("embedder", "path"): "owner/other",
    ("recall", "chunk_tokens"): 32,
    ("recall", "memories"): 1,
    ("recall", "min_score"): 0.5,
    ("recall", "margin"): 0.1,
    ("recall", "score_temperature"): 0.2,
}
"""Something else for everything that the preset says."""
WAYS = ("m3.yaml", "M3_", "--set")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m3.yaml"
    path.write_text(PRESET)
    return path


def value(config: Config, key: tuple[str, str]) -> Any:
    return config.model_dump()[key[0]].get(key[1])


def loaded(path: Path, said: dict[tuple[str, str], tuple[str, Any]]) -> tuple[LoadedConfig[Config], dict[str, str]]:
    """A configuration with the preset in which keys are said in one of `WAYS`, and what origins they must have."""
    tree = parse_yaml(PRESET, "")
    environ, sets, origins = {}, {}, {}
    for (section, name), (way, said_so) in said.items():
        dotted, text = f"{section}.{name}", json.dumps(said_so)
        origins[dotted] = way
        if way == "m3.yaml":
            tree.setdefault(section, {})[name] = said_so
        elif way == "--set":
            sets[dotted] = text
        else:
            origins[dotted] = f"M3_{section}__{name}".upper()
            environ[origins[dotted]] = text
    path.write_text(dumped(tree))
    return load_config(Config, path, environ, sets), origins


def test_the_preset_is_the_paper_s(file: Path) -> None:
    found = load_config(Config, file, {})
    config, memory = found.config, found.config.memory
    assert (memory.layers, memory.tokens_per_head, memory.reference_tokens) == ("first-half", 8, 128)
    assert (memory.sink, memory.sinks, memory.positions) == ("Reference:", "once", "parallel")
    assert (config.codec.kind, config.codec.options) == ("product", {"preset": "memory3"})
    assert (config.embedder.kind, config.embedder.path) == ("flag-embedding", "BAAI/bge-m3")
    assert (config.recall.memories, config.recall.chunk_tokens) == (5, 64)
    assert (config.recall.score_temperature, config.recall.margin, config.recall.min_score) == (None, None, -1)
    spec = memory_spec(memory, layers=44, kv_heads=8, head_dim=80, dtype="bfloat16")
    assert configured(config, spec).payload_bytes(8) == 39_424


def test_what_it_gives_comes_from_it_and_nothing_else_does(file: Path) -> None:
    origins = load_config(Config, file, {}).origins
    given = {f"{section}.{name}" for section, name in GIVEN}
    assert {key for key, origin in origins.items() if origin == ORIGIN} == given
    assert origins["memory.preset"] == "m3.yaml"
    assert origins["codec.file"] == origins["recall.deadline"] == "default"


said = st.dictionaries(st.sampled_from(sorted(OTHER)), st.sampled_from(WAYS))


@given(said)
def test_what_is_said_wins_and_the_rest_stays(tmp_path_factory: pytest.TempPathFactory, ways: dict[Any, str]) -> None:
    path = tmp_path_factory.getbasetemp() / "m3.yaml"
    found, origins = loaded(path, {key: (way, OTHER[key]) for key, way in ways.items()})
    for key, preset in GIVEN.items():
        dotted = ".".join(key)
        if key in ways:
            assert value(found.config, key) == OTHER[key]
            assert found.origins[dotted] == origins[dotted]
        elif key == ("codec", "preset") and ("codec", "kind") in ways:
            assert found.config.codec.options == {}  # of no other kind
        else:
            assert value(found.config, key) == preset
            assert found.origins[dotted] == ORIGIN


@given(said)
def test_a_dump_is_the_same_configuration(tmp_path_factory: pytest.TempPathFactory, ways: dict[Any, str]) -> None:
    path = tmp_path_factory.getbasetemp() / "m3.yaml"
    found, _ = loaded(path, {key: (way, OTHER[key]) for key, way in ways.items()})
    assert Config.model_validate(found.config.model_dump()) == found.config
    path.write_text(dumped(found.config.model_dump(mode="json")))
    assert Config.load(path, {}) == found.config


@pytest.mark.parametrize("key", sorted(OTHER), ids=".".join)
@pytest.mark.parametrize("way", WAYS)
def test_each_key_in_each_way(tmp_path: Path, key: tuple[str, str], way: str) -> None:
    found, origins = loaded(tmp_path / "m3.yaml", {key: (way, OTHER[key])})
    assert value(found.config, key) == OTHER[key]
    assert found.origins[".".join(key)] == origins[".".join(key)] != ORIGIN


def test_a_null_is_said_too(file: Path) -> None:
    file.write_text(PRESET + "codec: {preset: null}\n")
    assert load_config(Config, file, {}).config.codec.options == {"preset": None}


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("{kind: product}", {"preset": "memory3"}),
        ("{}", {"preset": "memory3"}),
        ("", {"preset": "memory3"}),
        ("{kind: raw}", {}),
        ("{bytes: 32}", {"bytes": 32}),
        ("{kind: product, scope: head}", {"scope": "head"}),
        ("{file: codec.safetensors}", {}),  # which says what it is
    ],
)
def test_a_codec_section_that_says_something_is_left_its_options(
    file: Path, codec: str, options: dict[str, Any]
) -> None:
    file.write_text(f"{PRESET}codec: {codec}\n")
    assert load_config(Config, file, {}).config.codec.options == options


def test_the_preset_can_be_set_from_outside(file: Path) -> None:
    file.write_text(BARE)
    for found in (
        load_config(Config, file, {"M3_MEMORY__PRESET": "memory3"}),
        load_config(Config, file, {}, {"memory.preset": "memory3"}),
        load_config(Config, file, {"M3_MEMORY": "{preset: memory3}"}),
    ):
        assert found.config.memory.tokens_per_head == 8
        assert found.origins["embedder.path"] == ORIGIN
    with pytest.raises(ConfigError, match=r"m3\.yaml: embedder\.path is missing$"):
        load_config(Config, file, {})
    file.write_text(PRESET)
    with pytest.raises(ConfigError, match=r"embedder\.path is missing$"):
        load_config(Config, file, {}, {"memory.preset": "null"})


def test_without_a_preset_nothing_changes(file: Path) -> None:
    file.write_text(BARE + "embedder: {path: e}\n")
    config = load_config(Config, file, {}).config
    assert config.memory == MemoryConfig()
    assert config.memory.layers == "all"
    assert ORIGIN not in load_config(Config, file, {}).origins.values()


def test_a_memory_section_by_itself_has_the_preset_s_values() -> None:
    memory = MemoryConfig.model_validate({"preset": "memory3", "tokens_per_head": 4})
    assert (memory.layers, memory.tokens_per_head) == ("first-half", 4)
    config = Config.model_validate({"bank": ".", "model": {"path": "m"}, "memory": memory})
    assert config.memory is memory
    assert config.embedder.path == "BAAI/bge-m3"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("memory: {preset: memory4}", "m3.yaml: memory.preset must be 'memory3', not 'memory4'"),
        ("memory: {preset: [memory3]}", "m3.yaml: memory.preset must be 'memory3', not ['memory3']"),
        ("memory: {preset: memory3, layer: 3}", "m3.yaml: memory.layer is not known; did you mean memory.layers?"),
        ("memory: {preset: memory3}\nrecall: 3", "m3.yaml: recall must be a mapping of keys to values, not 3"),
        ("memory: memory3", "m3.yaml: memory must be a mapping of keys to values, not 'memory3'"),
        (
            "memory: {preset: memory3}\nrecall: {lookahead_tokens: 70}",
            "m3.yaml: recall: lookahead_tokens (70) must be less than chunk_tokens (64)",
        ),
    ],
)
def test_what_is_wrong_beside_a_preset(file: Path, more: str, message: str) -> None:
    file.write_text(f"{BARE}{more}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Config, file, {})
    assert str(caught.value) == f"{file.parent}/{message}"


# Layers by range


@given(st.integers(0, 9999), st.integers(0, 300))
def test_a_range_of_layers(first: int, more: int) -> None:
    last = min(9999, first + more)
    assert MemoryConfig.model_validate({"layers": f"{first}-{last}"}).layers == tuple(range(first, last + 1))


@pytest.mark.parametrize("wrong", ["8-", "-8", "9-8", "8-23,30", "1-99999", "8 - 23", "middle"])
def test_what_is_no_range(file: Path, wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Config, file, {}, {"memory.layers": wrong})
    assert str(caught.value) == (
        "--set: memory.layers must be all, first-half, middle-half, a range such as 8-23 or a list of ascending layer "
        f"numbers, not {parse_yaml(wrong, '')!r}"
    )
