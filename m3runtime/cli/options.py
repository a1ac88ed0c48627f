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
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(file: Path | None, settings: list[str] | None) -> "LoadedConfig[Config]":
    """The configuration with the origin of each value. Raises `ConfigError`, or `InputError` for a bad ``--set``."""
    from m3runtime.config.loading import load_config
    from m3runtime.config.schema import Config

    overrides = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: write it as KEY=VALUE")
        overrides[key] = value
    return load_config(Config, file, overrides=overrides)


def configuration(file: Path | None, settings: list[str] | None) -> "Config":
    """The configuration in force; see `load`."""
    return load(file, settings).config


def print_json(value: Any) -> None:
    """Print one line of JSON on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def show_size(size: float) -> str:
    """A size in bytes with three significant digits. Units are powers of 1024, which the paper calls PB and TB."""
    power = 0
    while float(f"{size:.3g}") >= 1000 and power < len(_UNITS) - 1:
        size, power = size / 1024, power + 1
    return f"{short(size)} {_UNITS[power]}"


def short(number: float) -> str:
    """A number with three significant digits."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"
