import ast
import inspect
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, model_validator

from m3runtime.config import schema
from m3runtime.config.loading import LoadedConfig, load_config
from m3runtime.config.schema import Config
from m3runtime.config.units import format_seconds, format_size, parse_seconds, parse_size
from m3runtime.errors import ConfigError
from tests.yaml_text import dumped

REQUIRED = "bank: ./bank\nmodel: {path: owner/model}\nembedder: {path: owner/embedder}\n"
GIB = 1024**3


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m3.yaml"
    path.write_text(REQUIRED)
    return path


def load(
    file: Path, more: str = "", environ: dict[str, str] | None = None, sets: dict[str, str] | None = None
) -> LoadedConfig[Config]:
    file.write_text(REQUIRED + more)
    return load_config(Config, file, environ or {}, sets)


def complaint(file: Path, more: str = "", environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, more, environ)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{file.parent}/")


# Units


@given(st.integers(0, 2**64) | st.integers(0, 2**20).map(lambda n: n * 1024**2))
def test_sizes_round_trip(size: int) -> None:
    assert parse_size(format_size(size)) == parse_size(size) == size


@given(st.floats(0, allow_infinity=False, allow_nan=False) | st.integers(0, 10**6).map(float))
def test_times_round_trip(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds)) == parse_seconds(seconds) == seconds


@pytest.mark.parametrize(
    ("spelling", "size"),
    [("2GiB", 2 * GIB), ("1 gib", GIB), ("1.5KiB", 1536), ("1GB", 10**9), ("64", 64), (7, 7), ("0B", 0)],
)
def test_sizes_as_people_write_them(spelling: object, size: int) -> None:
    assert parse_size(spelling) == size


@pytest.mark.parametrize(
    ("spelling", "seconds"),
    [("50ms", 0.05), ("1.5s", 1.5), ("2m", 120), ("1h", 3600), (3, 3), (0.5, 0.5), ("1e-3", 0.001)],
)
def test_times_as_people_write_them(spelling: object, seconds: float) -> None:
    assert parse_seconds(spelling) == seconds


@pytest.mark.parametrize(
    ("value", "written"), [(2 * GIB, "2GiB"), (10**9, "1GB"), (1536, "1536B"), (1025, "1025B"), (0, "0B")]
)
def test_sizes_are_written_readably(value: int, written: str) -> None:
    assert format_size(value) == written


@pytest.mark.parametrize(("value", "written"), [(0.05, "50ms"), (1.5, "1.5s"), (120.0, "2m"), (0.0, "0s")])
def test_times_are_written_readably(value: float, written: str) -> None:
    assert format_seconds(value) == written


@pytest.mark.parametrize("wrong", ["", "GiB", "-1", -1, "1XB", "0.3B", 0.5, True, None, [1], "1 2", "٣", float("nan")])
def test_what_is_no_size_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"must be a size such as .*, not "):
        parse_size(wrong)


@pytest.mark.parametrize("wrong", ["", "ms", "-1s", "1M", "1d", True, None, "1e999", float("inf")])
def test_what_is_no_time_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"must be a time such as .*, not "):
        parse_seconds(wrong)


# Models


def test_every_field_is_described() -> None:
    models = [kind for kind in vars(schema).values() if isinstance(kind, type) and issubclass(kind, BaseModel)]
    assert Config in models
    for kind in models:
        body = cast(ast.ClassDef, ast.parse(inspect.getsource(kind)).body[0]).body
        described = {
            one.target.id
            for one, after in pairwise(body)
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(after, ast.Expr)
        }
        for name, field in kind.model_fields.items():
            if name in kind.__annotations__:
                assert name in described or field.annotation in models, f"{kind.__name__}.{name}"


def test_the_example_of_the_design_is_read(file: Path) -> None:
    config = load(
        file,
        """
memory: {layers: [0, 3], reference_tokens: 64}
codec: {kind: product, key_bytes: 32, value_bytes: 16}
index: {kind: usearch, dtype: f16, connectivity: 8}
tiers:
  - {kind: gpu, capacity: 2GiB, eviction: lru}
  - {kind: lmdb, max_size: 1GB}
recall: {deadline: 20ms, when_late: wait}
""",
    ).config
    assert config.memory.layers == (0, 3)
    assert config.codec.options == {"key_bytes": 32, "value_bytes": 16}
    assert config.index.options == {"connectivity": 8}
    assert [tier.options for tier in config.tiers] == [{"capacity": "2GiB", "eviction": "lru"}, {"max_size": "1GB"}]
    assert (config.recall.deadline, config.recall.when_late) == (0.02, "wait")


scalars = st.none() | st.booleans() | st.integers(-99, 2**70) | st.text(max_size=5)
words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)
names = words.filter(lambda word: word not in ("kind", "path", "dtype", "capacity"))
options = st.dictionaries(names, scalars | st.lists(scalars, max_size=2), max_size=3)
paths = st.text("abc/2.-", min_size=1, max_size=9)
tiers = st.builds(
    lambda more, kind, capacity: {**more, "kind": kind, "capacity": capacity}, options, words, st.integers(0, 2**50)
)


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


trees = st.fixed_dictionaries(
    {
        "bank": paths,
        "model": st.fixed_dictionaries({"path": paths}, optional={"dtype": st.sampled_from(["auto", "bfloat16"])}),
        "embedder": st.builds(lambda more, path: {**more, "path": path}, options, paths),
    },
    optional={
        "memory": optional(
            preset=st.none() | st.just("memory3"),
            layers=st.sampled_from(["all", "first-half", "middle-half"])
            | st.sets(st.integers(0, 99), min_size=1).map(sorted),
            sink=st.text(max_size=9),
            attention_temperature=st.floats(0, 2, exclude_min=True),
        ),
        "codec": options,
        "tiers": st.lists(tiers, max_size=3),
        "recall": optional(
            margin=st.none() | st.floats(0, 9),
            deadline=st.floats(0, 1e6),
            memories=st.integers(1, 99),
            when_late=st.sampled_from(["wait", "skip", "next_chunk"]),
            cold_start=st.booleans(),
        ),
        "generate": optional(stop=st.lists(st.text(min_size=1), max_size=2), temperature=st.floats(0, 9)),
    },
)


@given(trees)
def test_what_is_dumped_is_loaded_again(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dumped(tree), encoding="utf-8")
    config = Config.load(file, {})
    file.write_text(dumped(config.model_dump(mode="json")), encoding="utf-8")
    assert Config.load(file, {}) == config == Config.model_validate(config.model_dump())


def test_a_configuration_is_frozen(file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(file).config.bank = Path("other")


class Counted(Config):
    """Counts its validations."""

    validated: ClassVar[int] = 0

    @model_validator(mode="before")
    @classmethod
    def count(cls, values: object) -> object:
        cls.validated += 1
        return values


def test_a_configuration_is_validated_once(file: Path) -> None:
    environ, sets = {"M3_MEMORY__PRESET": "memory3", "M3_RECALL__MEMORIES": "3"}, {"recall.margin": "0.1"}
    load_config(Counted, file, environ, sets)
    assert Counted.validated == 1


# What is wrong is said in one line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("recall: {memorys: 3}", "m3.yaml: recall.memorys is not known; did you mean recall.memories?"),
        ("recal: {}", "m3.yaml: recal is not known; did you mean recall?"),
        ("memories: 3", "m3.yaml: memories is not known; did you mean recall.memories?"),
        (
            "model: {path: x, zzz: 1}",
            "m3.yaml: model.zzz is not known; known are adapter, compile, device, dtype, pack, path",
        ),
        ("7: x", "m3.yaml: 7 is not known; keys are text"),
        ("recall: {when_late: no}", "m3.yaml: recall.when_late must be 'wait', 'skip' or 'next_chunk', not 'no'"),
        ("recall: {memories: 0}", "m3.yaml: recall.memories must be greater than or equal to 1, not 0"),
        ("recall: {memories: yes}", "m3.yaml: recall.memories must be a valid integer, not 'yes'"),
        ("recall: {min_score: .nan}", "m3.yaml: recall.min_score must be a finite number, not nan"),
        ("recall: 3", "m3.yaml: recall must be a mapping of keys to values, not 3"),
        (
            "recall: {deadline: 3x}",
            "m3.yaml: recall.deadline must be a time such as 50ms, 1.5s, 2m or a number of seconds, not '3x'",
        ),
        ("recall: {chunk_tokens: 9}", "m3.yaml: recall: lookahead_tokens (16) must be less than chunk_tokens (9)"),
        (
            "memory: {layers: [3, 1]}",
            "m3.yaml: memory.layers must be all, first-half, middle-half, a range such as 8-23 or a list of ascending "
            "layer numbers, not [3, 1]",
        ),
        (
            "memory: {tokens_per_head: 0}",
            "m3.yaml: memory.tokens_per_head must be all, a whole number of at least 1, or a list of such numbers for "
            "each memory layer, one for each KV head, not '0'",
        ),
        ("memory: {tokens_per_head: []}", "m3.yaml: memory.tokens_per_head must be all, a whole number of at"),
        ("memory: {tokens_per_head: [[4, 0]]}", "m3.yaml: memory.tokens_per_head must be all, a whole number of at"),
        ("memory: {tokens_per_head: [[]]}", "m3.yaml: memory.tokens_per_head must be all, a whole number of at"),
        ("memory: {tokens_per_head: some}", "m3.yaml: memory.tokens_per_head must be all, a whole number of at"),
        ("memory: {tokens_per_head: yes}", "m3.yaml: memory.tokens_per_head must be all, a whole number of at"),
        ("memory: {tokens_per_head: 8.0}", "m3.yaml: memory.tokens_per_head must be all, a whole number of at"),
        ("memory: {layers: []}", "m3.yaml: memory.layers must be all, first-half, middle-half, a range such"),
        ("memory: {layers: some}", "m3.yaml: memory.layers must be all, first-half, middle-half, a range such"),
        (
            "recall: {cold_start: maybe}",
            "m3.yaml: recall.cold_start must be a valid boolean, unable to",
        ),
        ("tiers: {kind: gpu}", "m3.yaml: tiers must be a list, not {'kind': 'gpu'}"),
        ("tiers: [gpu]", "m3.yaml: tiers.0 must be a mapping of keys to values, not 'gpu'"),
        ("tiers: [{capacity: 1}]", "m3.yaml: tiers.0.kind is missing"),
        ("generate: {stop: [true]}", "m3.yaml: generate.stop.0 must be a valid string, not True"),
        ("model: {path: ''}", "m3.yaml: model.path must have at least 1 character, not ''"),
        ("embedder:", "m3.yaml: embedder.path is missing"),
        (
            "recall: {memories: 1, memories: 2}",
            'm3.yaml: line 4: found duplicate key "memories"',
        ),
        ("recall: [", "m3.yaml: line 4: "),
        ("recall: !!int x", "m3.yaml: "),
        ("recall: &a [*a]", "m3.yaml: too deeply nested"),
        ("recall: \0", r"m3.yaml: line 4: the character '\x00' is not allowed"),
        (
            "recall: {in_flight: 1GiB}",
            "m3.yaml: recall.in_flight is no longer known; recall.decoded bounds prefetched and leased memories",
        ),
        ("train: {steps: 1}", "m3.yaml: train.steps is not known; known are "),
        (
            "train: {data: [d], out: o, memory: {step: 1}}",
            "m3.yaml: train.memory.step is not known; did you mean train.memory.steps?",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(file: Path, more: str, message: str) -> None:
    # A section of REQUIRED that `more` gives anew would be a duplicate key.
    required = [line for line in REQUIRED.splitlines() if not more.startswith(line.partition(":")[0])]
    file.write_text("\n".join([*required, more]))
    with pytest.raises(ConfigError) as caught:
        Config.load(file, {})
    assert str(caught.value).startswith(f"{file.parent}/{message}")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^no such configuration file: nowhere\.yaml$"):
        Config.load("nowhere.yaml", {})
    with pytest.raises(ConfigError, match=f"^cannot read {tmp_path}: Is a directory$"):
        Config.load(tmp_path, {})
    for content, message in (
        (b"\xff\xfe\xff", "is not text in UTF-8"),
        (b"- a\n", "must be a mapping of keys to values"),
    ):
        (tmp_path / "m3.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=f"{tmp_path}/m3.yaml {message}"):
            Config.load(tmp_path / "m3.yaml", {})


# Overrides and where values come from


def test_variables_override_the_file_and_settings_override_both(file: Path) -> None:
    more = "recall: {memories: 9, min_score: 0.1, margin: 0.2}\ntiers: [{kind: gpu, capacity: 2GiB}, {kind: lmdb}]\n"
    environ = {
        "M3_RECALL__MEMORIES": "3",
        "M3_RECALL__MARGIN": "null",
        "M3_RECALL__MIN_SCORE": "0.5",
        "M3_TIERS__0__CAPACITY": "1GiB",
        "M3_CODEC__KEY_BYTES": "8",
        "M3_MODEL__PATH": "2024-05-01",
        "M3_GENERATE__STOP": "[a, b]",
        "M3_CONFIG": "ignored.yaml",
        "HOME": "/",
    }
    loaded = load(file, more, environ, {"recall.min_score": "-1", "tiers.1.max_size": "1MiB", "generate.stop.1": "c"})
    config = loaded.config
    assert (config.recall.memories, config.recall.margin, config.recall.min_score) == (3, None, -1)
    assert [tier.options for tier in config.tiers] == [{"capacity": "1GiB"}, {"max_size": "1MiB"}]
    assert config.codec.options == {"key_bytes": 8}
    assert config.model.path == "2024-05-01"
    assert config.generate.stop == ("a", "c")
    origins = loaded.origins
    assert origins["bank"] == origins["model.path"].replace("M3_MODEL__PATH", "m3.yaml") == "m3.yaml"
    assert origins["recall.memories"] == "M3_RECALL__MEMORIES"
    assert origins["recall.margin"] == "M3_RECALL__MARGIN"
    assert origins["recall.min_score"] == origins["tiers.1.max_size"] == origins["generate.stop"] == "--set"
    assert origins["tiers.0.kind"] == origins["tiers.1.kind"] == "m3.yaml"
    assert origins["tiers.0.capacity"] == "M3_TIERS__0__CAPACITY"
    assert origins["codec.key_bytes"] == "M3_CODEC__KEY_BYTES"
    assert origins["codec.kind"] == origins["recall.deadline"] == "default"


@pytest.mark.parametrize("name", ["2024_11", "2024.10", "007", "0x10", "1e3", "-5", "1_000.50"])
def test_a_name_that_looks_like_a_number_stays_as_it_was_written(file: Path, tmp_path: Path, name: str) -> None:
    file.write_text(f"bank: {name}\nmodel: {{path: {name}}}\nembedder: {{path: e, kind: {name}, size: {name}}}\n")
    config = load_config(Config, file, {"M3_CODEC__KIND": name}, {"memory.sink": name}).config
    assert config.bank == tmp_path / name
    assert config.model.path == config.embedder.kind == config.codec.kind == config.memory.sink == name
    assert type(config.embedder.options["size"]) in (int, float)  # an option stays a number


def test_a_text_that_ends_in_a_colon_is_a_text(file: Path) -> None:
    config = load(file, "", {"M3_MEMORY__SINK": "Note: "}, {"generate.stop.0": '"Q:"'}).config
    assert (config.memory.sink, config.generate.stop) == ("Note: ", ("Q:",))
    assert load(file, "", {}, {"memory.sink": "Reference:"}).config.memory.sink == "Reference:"


def test_variables_of_other_programs_are_left_alone(file: Path) -> None:
    foreign = {"M3_HOME": "/opt/maven", "M3_REPO_URL": "x", "M3_OPTS": "-X"}
    assert load(file, "", foreign).config == load(file, "").config
    for name in ("M3_BANKS", "M3_RECAL__MEMORIES", "M3_HOME__X"):
        with pytest.raises(ConfigError, match=f"^{name}: .* is not known; "):
            load(file, "", {name: "3"})


def test_every_value_has_an_origin(file: Path) -> None:
    origins = load(file, "recall:\nmemory: {}\n").origins
    assert {key for key, origin in origins.items() if origin != "default"} == {"bank", "model.path", "embedder.path"}
    assert {"tiers", "recall.memories", "generate.stop", "memory.layers"} < set(origins)


def test_an_empty_file_is_fine_if_the_rest_is_given(file: Path) -> None:
    file.write_text("")
    environ = {"M3_BANK": "bank", "M3_MODEL": "{path: m}", "M3_EMBEDDER__PATH": "e"}
    loaded = load_config(Config, file, environ)
    assert (loaded.config.model.path, loaded.origins["model.path"]) == ("m", "M3_MODEL")
    assert loaded.origins["model.dtype"] == "default"
    with pytest.raises(ConfigError, match=r"m3\.yaml: bank is missing$"):
        Config.load(file, {})


def test_a_list_grows_by_variables_in_their_order(file: Path) -> None:
    environ = {f"M3_TIERS__{place}__KIND": f"t{place}" for place in reversed(range(11))}
    assert [tier.kind for tier in load(file, "", environ).config.tiers] == [f"t{place}" for place in range(11)]


def test_an_override_changes_one_of_two_that_share_an_anchor(file: Path) -> None:
    more = "tiers: [&t {kind: a, capacity: 1}, *t, {<<: *t, kind: b}]"
    config = load(file, more, {"M3_TIERS__0__CAPACITY": "2"}).config
    assert [(tier.kind, tier.options["capacity"]) for tier in config.tiers] == [("a", 2), ("a", 1), ("b", 1)]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("RECALL__MEMORYS", "3", "recall.memorys is not known; did you mean recall.memories?"),
        ("BANKK", "3", "bankk is not known; did you mean bank?"),
        ("RECALL__MEMORIES", "many", "recall.memories must be a valid integer, not 'many'"),
        ("RECALL__MEMORIES__MORE", "3", "recall.memories must be a valid integer, not {'more': 3}"),
        ("RECALL__MEMORIES", "[", "line 1: "),
        ("TIERS__1__KIND", "gpu", "tiers.1.kind is not known; the list has 0 items, counted from 0"),
        ("TIERS__KIND", "gpu", "tiers.kind is not known; the list has 0 items, counted from 0"),
    ],
)
def test_a_wrong_variable_is_named(file: Path, variable: str, value: str, message: str) -> None:
    assert complaint(file, "tiers: []", {f"M3_{variable}": value}).startswith(f"M3_{variable}: {message}")


# Paths


def test_paths_are_relative_to_the_file(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    file.write_text("bank: 2024-05-01\nmodel: {path: ./model.gguf}\nembedder: {path: ../embedder}\n")
    for spelling in (file, "../m3.yaml"):
        config = Config.load(spelling, {})
        assert config.bank.resolve() == tmp_path / "2024-05-01"
        assert config.bank.is_absolute()
        assert Path(config.model.path).resolve() == tmp_path / "model.gguf"
        assert Path(config.embedder.path).resolve() == tmp_path.parent / "embedder"


def test_paths_of_overrides_are_relative_to_the_working_directory(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = load(file, "", {"M3_BANK": "b", "M3_MODEL__PATH": "./m"}, {"embedder.path": "~/e"}).config
    assert (config.bank, config.model.path) == (elsewhere / "b", str(elsewhere / "m"))
    assert config.embedder.path == str(tmp_path / "home" / "e")


def test_hub_names_and_absolute_paths_stay(file: Path) -> None:
    config = load(file, "", {"M3_BANK": "/banks/b", "M3_EMBEDDER__PATH": "/models/e"}).config
    assert (config.bank, config.model.path, config.embedder.path) == (Path("/banks/b"), "owner/model", "/models/e")


def test_the_file_by_default(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert Config.load(environ={}).bank == file.parent / "bank"
    file.rename(file.with_name("other.yaml"))
    assert load_config(Config, environ={"M3_CONFIG": "other.yaml"}).origins["bank"] == "other.yaml"
    with pytest.raises(ConfigError, match=r"^no such configuration file: m3\.yaml; `m3 init` makes one$"):
        Config.load(environ={})


def test_reading_a_configuration_is_light() -> None:
    code = """if True:
        import sys, m3runtime.config.schema, m3runtime.plugins.construction
        print(*{"torch", "numpy", "m3backends", "m3model"} & set(sys.modules))"""
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
