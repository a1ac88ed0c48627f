"""Options of all commands, the configuration that they select, and output."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3runtime.errors import InputError

if TYPE_CHECKING:
    from m3runtime.config.loading import LoadedConfig
    from m3runtime.config.schema import Config

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="Configuration file; default: $M3_CONFIG, or m3.yaml.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value: --set recall.memories=3.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(file: Path | None, settings: list[str] | None) -> "LoadedConfig":
    """The configuration with the origin of each value. Raises `ConfigError`, or `InputError` for a bad ``--set``."""
    from m3runtime.config.loading import load_config

    overrides = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: write it as KEY=VALUE")
        overrides[key] = value
    return load_config(file, overrides=overrides)


def configuration(file: Path | None, settings: list[str] | None) -> "Config":
    """The configuration in force; see `load`."""
    return load(file, settings).config


def print_json(value: Any) -> None:
    """Print one line of JSON on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def show_size(size: float) -> str:
    """A size in bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
