"""Where values stand in a text of YAML, and how others are put there with all else left as it is.

The text is not written anew from what it means: the parser that reads configurations tells where values stand, and
only what stands there is replaced, one place after the other.
"""

import re
from collections.abc import Mapping

import yaml

from m3runtime.errors import InputError

Value = int | float | None

SECTION = "recall"
MARK = "# m3 eval calibrate "
"""What a comment of evidence begins with; a date follows."""

_NAMES = ("memories", "min_score", "margin")

_BREAKS = r"\r\n\x85\u2028\u2029"  # what ends a line in YAML
_BREAK = re.compile(rf"\r\n|[{_BREAKS}]")
_LINE = re.compile(rf"[^{_BREAKS}]*")
_EVIDENCE = rf"[ \t]*{MARK}\d{{4}}-\d\d-\d\d[^{_BREAKS}]*"
_EVIDENCE_BEHIND = re.compile(rf"{_EVIDENCE}\Z")
_EVIDENCE_ABOVE = re.compile(rf"(?:(?:\A|(?<=[{_BREAKS}])){_EVIDENCE}(?:\r\n|[{_BREAKS}]))+\Z")
_ALIAS = re.compile(r"\s*:\s*(\*[^\s,\]}]+)")
_INDENT = 2

_Entry = tuple[yaml.Node, yaml.Node]


def edited_text(text: str, values: Mapping[str, Value], evidence: Mapping[str, str]) -> str:
    """A configuration's text with other values in ``recall``, and ``evidence`` (a date first) beside each of them.

    Raises `InputError` where there is no place for them. Whether the result means what it should is not checked: see
    `m3runtime.lab.evaluation.yaml_edit.edited`.
    """
    for name, value in values.items():
        text = _set(text, name, _spelled(value))
    notes = {name: " ".join(line.split()) for name, line in evidence.items()}
    _, section = _section(_composed(text))
    if isinstance(section, yaml.MappingNode) and section.flow_style:
        return _note_above(text, notes)
    for name, note in notes.items():
        text = _note_behind(text, name, note)
    return text


# -- values -------------------------------------------------------------------------------------------------------


def _set(text: str, name: str, spelled: str) -> str:
    """Change or add one value of the section."""
    root = _composed(text)
    item = f"{name}: {spelled}"
    if _entry(root, SECTION) is None:
        return _with_section(text, root, item)
    key, section = _section(root)
    if not isinstance(section, yaml.MappingNode):
        return _with_first(text, root, key, section, item)
    if entry := _entry(section, name):
        start, end = _span(text, entry)
        return text[:start] + ("" if start < end else " ") + spelled + text[end:]
    if not section.value:  # braces with nothing between
        start = section.start_mark.index + 1
        return text[:start] + item + text[start:]
    if section.flow_style:
        end = _end(text, section.value[-1])
        return f"{text[:end]}, {item}{text[end:]}"
    before = [entry for entry in section.value if entry[0].value in _NAMES]
    end = _line_end(text, _end(text, (before or section.value)[-1]))
    indent: int = section.value[0][0].start_mark.column
    return text[:end] + _newline(text) + " " * indent + item + text[end:]


def _with_section(text: str, root: yaml.MappingNode, item: str) -> str:
    """The section added at the end."""
    if root.flow_style:
        end = _end(text, root.value[-1])
        return f"{text[:end]}, {SECTION}: {{{item}}}{text[end:]}"
    end = min(root.end_mark.index, len(text))
    indent, newline = " " * root.value[0][0].start_mark.column, _newline(text)
    between = "" if _BREAK.fullmatch(text[end - 1 : end]) else newline
    added = f"{indent}{SECTION}:{newline}{indent}{' ' * _INDENT}{item}{newline}"
    return text[:end] + between + added + text[end:]


def _with_first(text: str, root: yaml.MappingNode, key: yaml.Node, nothing: yaml.Node, item: str) -> str:
    """The first value of a section that is there but empty."""
    start, end = nothing.start_mark.index, nothing.end_mark.index
    if root.flow_style:
        return f"{text[:start]}{'' if start < end else ' '}{{{item}}}{text[end:]}"
    eol = _line_end(text, end)
    line = _newline(text) + " " * (key.start_mark.column + _INDENT) + item
    return text[:start].rstrip(" \t") + text[end:eol] + line + text[eol:]


# -- evidence -----------------------------------------------------------------------------------------------------


def _note_behind(text: str, name: str, note: str) -> str:
    """Evidence at the end of a value's line, behind the user's own comment."""
    _, section = _section(_composed(text))
    entry = _entry(section, name)
    if entry is None:
        raise InputError(f"{SECTION}.{name} is not there")
    end = _span(text, entry)[1]
    eol = _line_end(text, end)
    own = _EVIDENCE_BEHIND.sub("", text[end:eol]).rstrip(" \t")
    return f"{text[:end]}{own}  {MARK}{note}{text[eol:]}"


def _note_above(text: str, notes: Mapping[str, str]) -> str:
    """Evidence on lines of its own, above the line that the section begins on."""
    root = _composed(text)
    key, _ = _section(root)
    start = _line_start(text, key.start_mark.index)
    if text[start : key.start_mark.index].strip():  # behind another key: perhaps within its value
        start = _line_start(text, root.start_mark.index)
    margin = text[start:][: len(text[start:]) - len(text[start:].lstrip(" "))]
    lines = [f"{margin}{MARK}{_named(name, note)}{_newline(text)}" for name, note in notes.items()]
    return _EVIDENCE_ABOVE.sub("", text[:start]) + "".join(lines) + text[start:]


def _named(name: str, note: str) -> str:
    """Evidence that stands apart from its value says whose it is, behind the date."""
    date, _, rest = note.partition(" ")
    return f"{date} {name}: {rest}"


# -- places -------------------------------------------------------------------------------------------------------


def _composed(text: str) -> yaml.MappingNode:
    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise InputError("must be a mapping of keys to values")
    return root


def _section(root: yaml.MappingNode) -> tuple[yaml.Node, yaml.Node]:
    """The section and its key."""
    entry = _entry(root, SECTION)
    if entry is None:
        raise InputError(f"{SECTION} is not there")
    key, section = entry
    if section.start_mark.index < key.end_mark.index:
        raise InputError(f"{SECTION} is an alias of another part of the file; write it out")
    return key, section


def _entry(node: yaml.Node, name: str) -> _Entry | None:
    return next(((key, value) for key, value in node.value if key.value == name), None)


def _span(text: str, entry: _Entry) -> tuple[int, int]:
    """Where a value stands."""
    key, value = entry
    if value.start_mark.index >= key.end_mark.index:
        return value.start_mark.index, value.end_mark.index
    alias = _ALIAS.match(text, key.end_mark.index)  # its node is where the anchor is
    return alias.span(1) if alias else (key.end_mark.index, key.end_mark.index)


def _end(text: str, entry: _Entry) -> int:
    """Where a value ends; of a block scalar, where its last line does."""
    return len(text[: _span(text, entry)[1]].rstrip())


def _line_start(text: str, index: int) -> int:
    return max((found.end() for found in _BREAK.finditer(text, 0, index)), default=0)


def _line_end(text: str, index: int) -> int:
    found = _LINE.match(text, index)
    return found.end() if found else index


def _newline(text: str) -> str:
    found = _BREAK.search(text)
    return found[0] if found else "\n"


def _spelled(value: Value) -> str:
    """As YAML has it."""
    line: str = yaml.safe_dump(value).partition("\n")[0]
    return line
