"""Changing a user's YAML file: laws over generated files, and the forms that recall's section can have."""

import re
import stat
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from m3runtime.config.loading import load_config
from m3runtime.config.schema import Config
from m3runtime.errors import InputError
from m3runtime.lab.evaluation.yaml_edit import MARK, Value, check_writable, edited, file_alone, replace

EVIDENCE = {name: f"2026-01-02 was {name}; log-likelihood -1.250 (-1.500 to -1.000)" for name in
            ("memories", "min_score", "margin")}  # fmt: skip
LATER = {name: line.replace("2026-01-02", "2027-03-04") for name, line in EVIDENCE.items()}
NEW: dict[str, Value] = {"memories": 3, "min_score": 0.412, "margin": None}

VALUES = st.fixed_dictionaries(
    {"memories": st.integers(1, 99), "min_score": st.floats(-1, 1), "margin": st.none() | st.floats(0, 2)}
)
REST = "bank: b\nmodel: {path: m}\nembedder: {path: e}\n"
COMMENTS = st.from_regex(r"# [a-z ü:'{},\"*&#-]{0,20}[a-z]", fullmatch=True)
RECALL = {
    "memories": ("5", "7", "!!int 5"),
    "min_score": ("0.3", "-1", "1.0e-1", ".5"),
    "margin": ("null", "0.1", "~", ""),
    "when_late": ("wait", "'skip'", '"wait"'),
    "chunk_tokens": ("64", "0x40"),
    "deadline": ("50ms", "1s"),
}
NEEDED = ("bank: ./bank", "model: {path: a/b,  dtype: auto}", "embedder:\n{i}kind: own.module:Name\n{i}path:   x/y")
OTHERS = (
    "generate:\n{i}stop: [\"\\n\",  'end']\n{i}max_new_tokens: 0x10", "generate: {stop: [a,\n{i}b]}",
    "tiers:\n- {kind: pinned, capacity: 1GiB}\n- kind: lmdb", "tiers:\n{i}- kind: lmdb\n",
    "memory: # of\n{i}sink: |\n{i}  Reference\n\n{i}layers: [0,   1]", "",
)  # fmt: skip


@st.composite
def sections(draw: st.DrawFn, indent: str) -> str:
    """The section as people write it, or nothing."""
    chosen = draw(st.lists(st.sampled_from(sorted(RECALL)), unique=True))
    items = [f"{name}: {draw(st.sampled_from(RECALL[name]))}" for name in chosen]
    form = draw(st.sampled_from(["lines", "braces", "nothing"]))
    if form == "nothing":
        return draw(st.sampled_from(["", "recall:\n", "recall: {}\n", "recall:  # mine\n"]))
    if form == "braces":
        return "recall: {" + ", ".join(items) + "}" + draw(st.just("") | COMMENTS.map(lambda text: f"   {text}")) + "\n"
    lines = ["recall:" + draw(st.just("") | COMMENTS.map(lambda text: f"  {text}"))]
    for item in items:
        lines += draw(st.lists(COMMENTS.map(lambda text: f"{indent}{text}") | st.just(""), max_size=1))
        lines.append(indent + item + draw(st.just("") | COMMENTS.map(lambda text: f"  {text}")))
    return "\n".join(lines) + "\n"


@st.composite
def files(draw: st.DrawFn) -> tuple[str, str, str]:
    """A configuration in three parts: before, in and after its section."""
    indent = " " * draw(st.integers(1, 5))
    others = draw(st.permutations([*NEEDED, draw(st.sampled_from(OTHERS))]))
    blocks = [f"{draw(COMMENTS | st.just(''))}\n{block}\n".replace("{i}", indent) for block in others]
    place = draw(st.integers(0, len(blocks)))
    first = draw(st.sampled_from(["", "\ufeff", "# first\n", "---\n"]))
    last = draw(st.sampled_from(["", "\n", "# the end\n", "...\n"]))
    section = draw(sections(indent))
    if not section:  # it is added behind everything
        place = len(blocks)
        if last == "# the end\n":
            blocks, last, place = [*blocks, last], "", place + 1
    return first + "".join(blocks[:place]), section, "".join(blocks[place:]) + last


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def put(folder: Path, text: str) -> Path:
    path = folder / "m3.yaml"
    path.write_bytes(text.encode())
    return path


def comments(text: str) -> list[str]:
    """The comments of a text but for evidence."""
    return re.findall(r"(?m)(?<=\s)(?!# m3 eval)# [^\n]*?(?=\s*# m3 eval|$)", text)


@given(files(), VALUES, st.sampled_from(["\n", "\r\n"]))
@example(("", "recall:\n  margin:\n  # about\n  memories: 5  # mine\n", REST), NEW, "\n")
def test_the_new_values_are_in_force_and_nothing_else_is_changed(
    folder: Path, parts: tuple[str, str, str], new: dict[str, Value], newline: str
) -> None:
    before, section, after = (part.replace("\n", newline) for part in parts)
    path = put(folder, before + section + after)
    config = file_alone(path)
    result = edited(path, new, EVIDENCE)
    assert file_alone(put(folder, result)) == config.model_copy(update={"recall": config.recall.model_copy(update=new)})
    assert result.startswith(before)
    assert result.endswith(after)
    written = result[len(before) : len(result) - len(after)]
    assert comments(written.replace(newline, "\n")) == comments(section.replace(newline, "\n"))
    assert written.count(MARK) == 3
    for name, line in EVIDENCE.items():
        assert re.search(rf"(?m)^ +{name}: \S+ .*{MARK}{re.escape(line)}\r?$", written)
    assert newline == "\n" or "\n" not in result.replace("\r\n", "")


@given(files(), VALUES)
def test_a_second_time_changes_nothing_and_later_evidence_takes_the_place(
    folder: Path, parts: tuple[str, str, str], new: dict[str, Value]
) -> None:
    once = edited(put(folder, "".join(parts)), new, EVIDENCE)
    assert edited(put(folder, once), new, EVIDENCE) == once
    later = edited(put(folder, once), new, LATER)
    assert later == once.replace("2026-01-02", "2027-03-04")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "recall:\n    memories: 5   # five\n    when_late: wait\n",
            "recall:\n    memories: 3   # five  # m3 eval calibrate M\n    when_late: wait\n"
            "    min_score: 0.412  # m3 eval calibrate S\n    margin: null  # m3 eval calibrate G\n",
        ),
        (
            "recall: {memories: 5, min_score: 0.3}  # mine\n",
            "recall:  # mine\n  memories: 3  # m3 eval calibrate M\n  min_score: 0.412  # m3 eval calibrate S\n"
            "  margin: null  # m3 eval calibrate G\n",
        ),
        (
            "",
            "recall:\n  memories: 3  # m3 eval calibrate M\n  min_score: 0.412  # m3 eval calibrate S\n"
            "  margin: null  # m3 eval calibrate G\n",
        ),
    ],
)
def test_how_it_looks(folder: Path, before: str, after: str) -> None:
    result = edited(put(folder, REST + before), NEW, EVIDENCE)
    for short, name in (("M", "memories"), ("S", "min_score"), ("G", "margin")):
        result = result.replace(EVIDENCE[name], short)
    assert result == REST + after


@pytest.mark.parametrize(
    "text",
    [
        "bank: b\nmodel: {path: m}\nembedder: {path: e}",
        REST + "...\n",
        REST + "recall:\n  when_late: >-\n    wait\n",
        REST + '"recall":\n  "memories": 5\n',
        REST + "recall: {memories: 5,\n  min_score: 0.3}\n",
        REST + "recall:\n  {memories: 5}\n",
        "generate: {max_new_tokens: &five 5}\n" + REST + "recall:\n  memories: 5\n",
    ],
)
def test_unusual_forms(folder: Path, text: str) -> None:
    path = put(folder, text)
    before = file_alone(path)
    path.write_text(edited(path, NEW, EVIDENCE))
    after = file_alone(path)
    assert after == before.model_copy(update={"recall": before.recall.model_copy(update=NEW)})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tiers:\n- &r {kind: lmdb}\n" + REST + "recall: *r\n", "alias"),
        ("x: &n 5\n" + REST + "recall:\n  memories: *n\n", "alias 'n'"),
        ("{bank: b, model: {path: m}, embedder: {path: e}}", "one key a line"),
        ("  bank: b\n  model: {path: m}\n  embedder: {path: e}\n", "cannot be changed here"),
        (REST + "recall: {memories: 5,  # five\n  min_score: 0.3}\n", "losing the comment # five"),
        (REST + "recall: 5\n", "recall must be a mapping"),
        (REST + "recall:\n  memories: &n 5\ngenerate: {max_new_tokens: *n}\n", "cannot be changed here"),
        ("", "must be a mapping"),
        ("bank: [b\n", "cannot be changed here"),
        (REST + "nonsense: 1\n", "cannot be changed here: it: nonsense is not known"),
    ],
)
def test_what_cannot_be_changed_is_said_in_one_line(folder: Path, text: str, complaint: str) -> None:
    path = put(folder, text)
    with pytest.raises(InputError, match=complaint) as caught:
        edited(path, NEW, EVIDENCE)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_text() == text


def test_a_file_that_would_mean_something_else_is_refused(folder: Path) -> None:
    path = put(folder, REST)

    def load(copy: Path):  # as if the editing had gone wrong
        config = file_alone(copy)
        return config.model_copy(update={"bank": Path("other")}) if "memories" in copy.read_text() else config

    with pytest.raises(InputError, match="without changing something else"):
        edited(path, NEW, EVIDENCE, load)


# The file itself


def test_mode_and_symbolic_link_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path = put(tmp_path / "real", REST)
    path.chmod(0o640)
    link = tmp_path / "m3.yaml"
    link.symlink_to(path)
    replace(link, "other: text\n")
    assert link.is_symlink()
    assert path.read_text() == "other: text\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [one.name for one in path.parent.iterdir()] == ["m3.yaml"]


def test_a_read_only_file_is_left_alone(tmp_path: Path) -> None:
    path = put(tmp_path, REST)
    path.chmod(0o444)
    for attempt in (lambda: check_writable(path), lambda: replace(path, "other")):
        with pytest.raises(InputError, match=r"m3\.yaml is read-only"):
            attempt()
    assert path.read_text() == REST


def test_origins_say_that_the_values_come_from_the_file(tmp_path: Path) -> None:
    path = put(tmp_path, REST)
    replace(path, edited(path, NEW, EVIDENCE))
    origins = load_config(Config, path, {}).origins
    assert {origins[f"recall.{name}"] for name in NEW} == {"m3.yaml"}
