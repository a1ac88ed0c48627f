"""Writes chosen values of ``recall``, and the evidence for them, into a user's YAML file.

Only the lines of the section are changed; ruamel.yaml keeps their comments and layout.
"""

import os
import re
import stat
import tempfile
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import CommentMark, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.tokens import CommentToken

from m3runtime.config.schema import Config
from m3runtime.errors import ConfigError, InputError
from m3runtime.storage.files import write_atomically

Load = Callable[[Path], Config]
Value = int | float | None

SECTION = "recall"
MARK = "# m3 eval calibrate "
"""The beginning of a comment with evidence; a date follows."""
_EVIDENCE = re.compile(rf"\s*{MARK}\d{{4}}-\d\d-\d\d.*")
_WIDTH = 1 << 20
"""Columns of a line: none is broken."""


def file_alone(path: Path) -> Config:
    """The configuration of a file without the environment."""
    return Config.load(path, environ={})


def edited(path: Path, values: Mapping[str, Value], evidence: Mapping[str, str], load: Load = file_alone) -> str:
    """The file's text with other values in ``recall``, each with its ``evidence`` (a date first) as a comment.

    Earlier evidence is replaced, comments and all other lines stay. Read by ``load``, the text gives the new values
    and otherwise the same configuration. Raises `InputError` with one line if that cannot be done.
    """
    text = _read(path)
    try:
        new = edited_text(text, values, evidence)
    except YAMLError as error:
        raise InputError(f"{path}: {SECTION} cannot be changed here: {' '.join(str(error).split())}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    with tempfile.TemporaryDirectory() as folder:  # the same for both, or relative paths would differ
        copy = Path(folder) / "m3.yaml"
        try:
            before, after = (_loaded(copy, content, load) for content in (text, new))
        except ConfigError as error:
            raise InputError(f"{path}: {SECTION} cannot be changed here: {error}".replace(str(copy), "it")) from error
    if after != before.model_copy(update={SECTION: before.recall.model_copy(update=dict(values))}):
        raise InputError(f"{path}: {SECTION} cannot be changed here without changing something else; write it out")
    return new


def check_writable(path: Path) -> None:
    """Raise `InputError` if the file cannot be changed, or is not meant to be."""
    try:
        writable = path.stat().st_mode & 0o222 and os.access(path, os.W_OK)  # root may, whatever the mode says
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not writable or not os.access(path.resolve().parent, os.W_OK):
        raise InputError(f"{path} is read-only; make it writable, or see with --dry-run what would be written")


def replace(path: Path, text: str) -> None:
    """Put a text in a file's place, whole or not at all; its mode stays, and a symbolic link remains one."""
    check_writable(path)
    target = path.resolve()
    write_atomically(target, text.encode(), mode=stat.S_IMODE(target.stat().st_mode))


def edited_text(text: str, values: Mapping[str, Value], evidence: Mapping[str, str]) -> str:
    """A configuration's text with other values in ``recall`` and the evidence for each. The result is not checked.

    A section in braces is written out, one key a line. Raises `InputError` if there is no place for the values, and
    `YAMLError` if the text is not YAML.
    """
    mark = text[: text.startswith("\ufeff")]
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.removeprefix(mark).replace("\r\n", "\n").removesuffix("\n").split("\n")
    root = YAML().compose("\n".join([*lines, ""]))
    if not isinstance(root, MappingNode) or not root.value or root.flow_style:
        raise InputError("must be a mapping of keys to values, one key a line")
    starts = [key.start_mark.line for key, _ in root.value] + [root.end_mark.line]
    place = next((place for place, (key, _) in enumerate(root.value) if key.value == SECTION), None)
    first, end = (starts[-1], starts[-1]) if place is None else starts[place : place + 2]
    while place is not None and lines[end - 1].lstrip()[:1] in ("", "#"):
        end -= 1  # such lines belong to what follows
    first = min(first, end)
    indent = 2
    section = None if place is None else root.value[place][1]
    if isinstance(section, MappingNode) and section.value and not section.flow_style:
        indent = section.value[0][0].start_mark.column - root.start_mark.column
    part = "\n".join([*(lines[first:end] or [f"{SECTION}:"]), ""])
    new = _edited_section(part, indent, values, evidence).removesuffix("\n").split("\n")
    return mark + newline.join([*lines[:first], *new, *lines[end:], ""])


def _edited_section(part: str, indent: int, values: Mapping[str, Value], evidence: Mapping[str, str]) -> str:
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = _WIDTH
    yaml.indent(mapping=indent)
    root = yaml.load(part)
    section = root[SECTION]
    if section is None:
        section = root[SECTION] = CommentedMap()
    if not isinstance(section, CommentedMap):
        raise InputError(f"{SECTION} must be a mapping of keys to values")
    if section.fa.flow_style():
        section.fa.set_block_style()
        if behind := root.ca.items.get(SECTION):
            behind[2].start_mark.column = len(SECTION) + 3
    for name, value in values.items():
        section[name] = value
        _note(section, name, " ".join(evidence[name].split()))
    new = StringIO()
    yaml.dump(root, new)
    for line in part.splitlines():
        comment = "".join(_EVIDENCE.sub("", line).partition("#")[1:])
        if comment not in new.getvalue():
            raise InputError(f"{SECTION} cannot be changed here without losing the comment {comment}")
    return new.getvalue()


def _note(section: CommentedMap, name: str, note: str) -> None:
    """Put evidence at the end of a key's line, behind the user's own comment; comments on lines below stay."""
    comments = section.ca.items.setdefault(name, [None] * 4)
    token = comments[2]
    line, _, below = (token.value if token else "").partition("\n")
    own = _EVIDENCE.sub("", line)
    comment = f"{own}  {MARK}{note}" if own else f" {MARK}{note}"
    column = CommentMark(token.start_mark.column if own else 0)
    comments[2] = CommentToken(f"{comment}\n{below}", column)


class _Representer(RoundTripRepresenter):
    """Writes null as ``null``, not as nothing."""

    def represent_none(self, _: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8") from error


def _loaded(copy: Path, content: str, load: Load) -> Config:
    copy.write_bytes(content.encode())
    return load(copy)
