"""``m3 config``."""

import typer

from m3runtime.cli.options import ConfigFile, Json, Set, load, print_json


def config(config: ConfigFile = None, set: Set = None, json: Json = False) -> None:
    """Print the configuration in force, and where each value came from."""
    loaded = load(config, set)
    values = loaded.config.model_dump(mode="json")
    if json:
        print_json({"config": values, "origins": dict(loaded.origins)})
        return
    for key, origin in loaded.origins.items():
        value: object = values
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]  # type: ignore[index]
        typer.echo(f"{f'{key}: {value}':<60}  # {origin}")
