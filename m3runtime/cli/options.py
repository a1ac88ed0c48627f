"""Options of all commands, the configuration that they select, and output."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from m3runtime.cli.terminal import console, print_json
from m3runtime.errors import InputError

if TYPE_CHECKING:
    from m3runtime.config.loading import LoadedConfig
    from m3runtime.config.schema import Config, DocumentsConfig
    from m3runtime.lab.results import Result
    from m3runtime.retrieval.restriction import Restriction

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="Configuration file; default: $M3_CONFIG, or m3.yaml.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value: --set recall.memories=3.")
]
TextField = Annotated[
    str | None,
    typer.Option(
        help="The field of a jsonl line that holds the text; default: documents.text_field.", show_default=False
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="KEY=VALUE",
        help="Only memories with such metadata, as in recall.where: lang=en, team=[a, b], year={at_least: 2020}.",
    ),
]
T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(file: Path | None, settings: list[str] | None) -> "LoadedConfig[Config]":
    """The configuration with the origin of each value. Raises `ConfigError`, or `InputError` for a bad ``--set``."""
    from m3runtime.config.loading import load_config
    from m3runtime.config.schema import Config

    return load_config(Config, file, overrides=overrides(settings))


def overrides(settings: list[str] | None, option: str = "--set") -> dict[str, str]:
    """The values of ``--set``, or another option, by key. Raises `InputError`."""
    found = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"{option} {setting}: write it as KEY=VALUE")
        found[key] = value
    return found


def restriction(where: list[str] | None) -> "Restriction":
    """The restriction of ``--where``. Raises `InputError`, or `ConfigError` for a value that is not YAML."""
    from m3runtime.config.where import conditions
    from m3runtime.config.yaml_file import parse_yaml
    from m3runtime.retrieval.restriction import Restriction

    given = {key: parse_yaml(text, "--where", written=True) for key, text in overrides(where, "--where").items()}
    try:
        return Restriction(where=conditions(given))
    except ValueError as error:
        raise InputError(f"--where {error}") from None


def configuration(file: Path | None, settings: list[str] | None) -> "Config":
    """The configuration in force; see `load`."""
    return load(file, settings).config


def as_text(what: str, argument: str) -> str:
    """An argument that is text. Raises `InputError` for bytes that are none, which Python hides in surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} is not text in UTF-8") from None
    return argument


def documents_fields(settings: "Config", text_field: str | None) -> "DocumentsConfig":
    """The fields of JSON lines: the configured ones, with the text from another one if it is given."""
    return (
        settings.documents if text_field is None else settings.documents.model_copy(update={"text_field": text_field})
    )


def parsed(option: str, parse: Callable[[str], T], text: str) -> T:
    """The value of an option's text. A `ValueError` of ``parse`` becomes an `InputError` that names the option."""
    try:
        return parse(text)
    except ValueError as error:
        raise InputError(f"{option} {error}") from None


def show(result: "Result", *, json: bool) -> None:
    """Print the result of an experiment: as tables, or as one line of JSON."""
    if json:
        print_json(result.to_json())
    else:
        console().print(result)
