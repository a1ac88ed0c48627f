"""Changing a user's YAML file: laws over generated files, and the forms that recall's section can have."""

import os
import re
import stat
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from m3runtime.config.loading import load_config
from m3runtime.config.schema import Config
from m3runtime.errors import InputError
from m3runtime.lab.evaluation.yaml_edit import check_writable, edited, file_alone, replace
from m3runtime.lab.evaluation.yaml_text import MARK, Value, edited_text

EVIDENCE = {name: f"2026-01-02 was {name}; log-likelihood -1.250 (-1.500 to -1.000)" for name in
            ("memories", "min_score", "margin")}  # fmt: skip
LATER = {name: line.replace("2026-01-02", "2027-03-04") for name, line in EVIDENCE.items()}
NEW: dict[str, Value] = {"memories": 3, "min_score": 0.412, "margin": None}

VALUES = st.fixed_dictionaries(
    {"memories": st.integers(1, 99), "min_score": st.floats(-1, 1), "margin": st.none() | st.floats(0, 2)}
).map(lambda drawn: {name: drawn[name] for name in EVIDENCE})  # whose order is that of new lines
COMMENTS = st.from_regex(r"# [a-z ü:'{},\"*&#-]{0,20}[a-z]", fullmatch=True)
GAPS = st.sampled_from(["", " ", "  ", "      "])
RECALL = {
    "memories": ("5", "7", "!!int 5"),
    "min_score": ("0.3", "-1", "1.0e-1", ".5"),
    "margin": ("null", "0.1", "~", ""),
    "when_late": ("wait", "'skip'", '"wait"'),
    "chunk_tokens": ("64", "0x40"),
    "deadline": ("50ms", "1s"),
}
OTHERS = (
    "bank: ./bank", 'bank: "a # bank"', "model: {path: a/b,  dtype: auto}", "model:\n{i}path:   'a/b'",
    "embedder:\n{i}kind: own.module:Name\n{i}path: x/y", "embedder: {{path: x/y}}",
    "generate:\n{i}stop: [\"\\n\",  'end']\n{i}max_new_tokens: 0x10", "generate: {{stop: [a,\n{i}b]}}",
    "tiers:\n- {{kind: pinned, capacity: 1GiB}}\n- kind: lmdb", "tiers:\n{i}- kind: lmdb\n",
    "memory: # of\n{i}sink: |\n{i}  Reference\n\n{i}layers: [0,   1]",
)  # fmt: skip


@st.composite
def files(draw: st.DrawFn) -> str:
    """A configuration as people write them: any order, indentation, comments, ends of lines."""
    indent = " " * draw(st.integers(1, 5))
    chosen: dict[str, str] = {}
    for other in OTHERS:
        if draw(st.booleans()) or other.startswith(("bank: .", "model: {p", "embedder: {{")):
            chosen[other.partition(":")[0]] = other.replace("{i}", indent).replace("{{", "{").replace("}}", "}")
    blocks = draw(st.permutations([*chosen.values(), draw(sections(indent))]))
    lines: list[str] = []
    for block in blocks:
        if draw(st.booleans()):
            lines.append(draw(COMMENTS | st.just("")))
        lines += block.split("\n")
    text = "\n".join(lines) + draw(st.sampled_from(["", "\n", "\n\n", "\n# the end\n", "\n# the end"]))
    return draw(st.sampled_from(["", "\ufeff", "# first\n", "---\n"])) + text


@st.composite
def sections(draw: st.DrawFn, indent: str) -> str:
    form = draw(st.sampled_from(["lines", "braces", "nothing", "empty"]))
    if form == "nothing":
        return "# without it"
    if form == "empty":
        return "recall:" + draw(st.sampled_from(["", " {}", " null", " ~", "   # how", " { }  # how"]))
    names = draw(st.lists(st.sampled_from(sorted(RECALL)), unique=True, min_size=1))
    items = [f"{name}: {draw(st.sampled_from(RECALL[name]))}" for name in names]
    if form == "braces":
        gap = draw(st.sampled_from([", ", ",", " ,  ", f",\n{indent}"]))
        return "recall: {" + gap.join(items) + "}" + draw(st.just("") | COMMENTS.map(lambda text: f"   {text}"))
    lines = ["recall:" + draw(st.just("") | COMMENTS.map(lambda text: f"  {text}"))]
    for item in items:
        lines += draw(st.lists(COMMENTS.map(lambda text: f"{indent}{text}"), max_size=1))
        lines.append(indent + item + draw(st.just("") | COMMENTS.map(lambda text: f"  {text}")))
    return "\n".join(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def put(folder: Path, text: str) -> Path:
    path = folder / "m3.yaml"
    path.write_bytes(text.encode())
    return path


def without_evidence(text: str) -> str:
    """The text without what was added to the user's lines, all white space left out."""
    text = re.sub(rf"{MARK}\d{{4}}-.*", "", text)
    for name in ("memories", "min_score", "margin"):
        text = re.sub(rf",?[ \t]*{name}:[ \t]*((!!int )?[-+.\w]+)?", "", text)
    return re.sub(r"recall:|\bnull\b|[\s~{},]", "", text)


@given(files(), VALUES, st.sampled_from(["\n", "\r\n"]))
def test_the_new_values_are_in_force_and_nothing_else_is_changed(
    folder: Path, text: str, new: dict[str, Value], newline: str
) -> None:
    text = text.replace("\n", newline)
    path = put(folder, text)
    before = file_alone(path)
    result = edited(path, new, EVIDENCE)
    path.write_bytes(result.encode())
    after = file_alone(path)
    assert {name: getattr(after.recall, name) for name in new} == new
    assert after == before.model_copy(update={"recall": before.recall.model_copy(update=new)})
    assert result.count(MARK) == 3
    for line in EVIDENCE.values():
        assert line.partition(" ")[2] in result
    assert without_evidence(result) == without_evidence(text)
    assert (newline == "\r\n") == ("\r\n" in result)
    if newline == "\r\n" and "\n" in text:
        assert "\n" not in result.replace("\r\n", "")


@given(files(), VALUES)
def test_a_second_time_changes_nothing_and_later_evidence_takes_the_place(
    folder: Path, text: str, new: dict[str, Value]
) -> None:
    once = edited(put(folder, text), new, EVIDENCE)
    assert edited(put(folder, once), new, EVIDENCE) == once
    later = edited(put(folder, once), NEW, LATER)
    assert "2026-01-02" not in later
    assert later == edited(put(folder, edited(put(folder, text), NEW, LATER)), NEW, LATER)
    assert edited(put(folder, later), new, EVIDENCE) == once


def lines_in_braces(text: str) -> range:
    """The lines that the section takes if it stands between braces."""
    root = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    for key, value in root.value:
        if key.value == "recall" and isinstance(value, yaml.MappingNode) and value.flow_style:
            return range(key.start_mark.line, value.end_mark.line + 1)
    return range(0)


@given(files())
@example("bank: b\nmodel: {path: m}\nembedder: {path: e}\nrecall: {chunk_tokens: 64,\n  deadline: 50ms}   # a")
def test_lines_that_are_not_of_the_section_stay_byte_for_byte(folder: Path, text: str) -> None:
    result = edited(put(folder, text), NEW, EVIDENCE)
    there = result.splitlines()
    between_braces = lines_in_braces(text)
    for number, line in enumerate(text.splitlines()):
        if number in between_braces or not line.strip() or re.search(r"recall|memories|min_score|margin", line):
            continue
        assert any(other == line or other.startswith((f"{line}  {MARK}", f"{line}, ")) for other in there) or (
            line.endswith("}") and any(line[:-1] in other for other in there)
        )


REST = "bank: b\nmodel: {path: m}\nembedder: {path: e}\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "recall:\n    memories: 5   # five\n    when_late: wait\n",
            "recall:\n    memories: 3   # five  # m3 eval calibrate M\n    min_score: 0.412  # m3 eval calibrate S\n"
            "    margin: null  # m3 eval calibrate G\n    when_late: wait\n",
        ),
        (
            "recall: {memories: 5, min_score: 0.3}  # mine\n",
            "# m3 eval calibrate memories M\n# m3 eval calibrate min_score S\n# m3 eval calibrate margin G\n"
            "recall: {memories: 3, min_score: 0.412, margin: null}  # mine\n",
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
        date, _, rest = EVIDENCE[name].partition(" ")
        result = result.replace(f"{date} {name}: {rest}", f"{name} {short}").replace(EVIDENCE[name], short)
    assert result == REST + after


@pytest.mark.parametrize(
    "text",
    [
        "{bank: b, model: {path: m}, embedder: {path: e}}",
        "{bank: b, model: {path: m}, embedder: {path: e}, recall: {memories: 5}}\n",
        "{\n  bank: b,\n  recall: {memories: 5, },\n  model: {path: m},\n  embedder: {path: e}\n}\n",
        "{bank: b, recall: , model: {path: m}, embedder: {path: e}}",
        "  bank: b\n  model: {path: m}\n  embedder: {path: e}\n  recall:\n    memories: 5",
        REST + "...\n",
        REST + "recall:\n  when_late: >-\n    wait\n",
        REST + '"recall":\n  "memories": 5\n',
        "generate: {max_new_tokens: &five 5}\n" + REST + "recall:\n  memories: *five\n",
        "generate: {max_new_tokens: &five 5}\n"
        + REST
        + "recall: {memories: *five, chunk_tokens: *five, lookahead_tokens: 1}",
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


@given(files(), VALUES)
def test_the_text_alone_needs_no_file(text: str, new: dict[str, Value]) -> None:
    text = text.removeprefix("\ufeff")
    assert edited_text(edited_text(text, new, EVIDENCE), new, EVIDENCE) == edited_text(text, new, EVIDENCE)


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


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    path = put(tmp_path, REST)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((os, "fsync") if at == "fsync" else (Path, "replace")), crash)
    with pytest.raises(KeyboardInterrupt):
        replace(path, "half")
    assert path.read_text() == REST
    assert [one.name for one in tmp_path.iterdir()] == ["m3.yaml"]


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
