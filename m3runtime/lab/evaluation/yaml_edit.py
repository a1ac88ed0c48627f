"""Puts recall's values and the evidence for them into a user's YAML file, which changes whole or not at all."""

import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from m3runtime.config.loading import load_config
from m3runtime.config.schema import Config
from m3runtime.errors import ConfigError, InputError
from m3runtime.lab.evaluation.yaml_text import SECTION, Value, edited_text
from m3runtime.storage.files import write_atomically

Load = Callable[[Path], Config]


def file_alone(path: Path) -> Config:
    """What a configuration file says without the environment."""
    return load_config(path, environ={}).config


def edited(path: Path, values: Mapping[str, Value], evidence: Mapping[str, str], load: Load = file_alone) -> str:
    """The file's text with other values in ``recall``, and ``evidence`` (a date first) beside each of them.

    The evidence is a comment at the line's end, or on lines before a section that stands between braces; that of an
    earlier time is replaced. Read by ``load``, the text gives exactly the new values and else the same configuration.
    Raises `InputError` if that cannot be done.
    """
    text = _read(path)
    mark = text[: text.startswith("\ufeff")]
    try:
        new = mark + edited_text(text.removeprefix(mark), values, evidence)
    except yaml.YAMLError as error:
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
    """Raise `InputError` if the file is not to be changed."""
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
