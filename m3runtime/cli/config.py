"""``m3 config``: print the configuration in force."""

from json import dumps

from m3runtime.cli.options import ConfigFile, Json, Set, load
from m3runtime.cli.terminal import print_json, say


def config(config: ConfigFile = None, set: Set = None, json: Json = False) -> None:
    """Print the configuration in force, and the origin of each value."""
    from m3runtime import assembly
    from m3runtime.storage.defaults import default_tiers

    loaded = load(config, set)
    values, origins = loaded.config.model_dump(mode="json"), dict(loaded.origins)
    if not loaded.config.tiers:
        del origins["tiers"]
        values["tiers"] = [tier.model_dump(mode="json") for tier in default_tiers(assembly.device(loaded.config))]
        origins |= {f"tiers.{i}.{key}": "default" for i, tier in enumerate(values["tiers"]) for key in tier}
    if json:
        print_json({"config": values, "origins": origins})
        return
    for key, origin in origins.items():
        value: object = values
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]  # type: ignore[index]
        say(f"{f'{key}: {_spelled(value)}':<60}  # {origin}")


def _spelled(value: object) -> str:
    """As YAML has it."""
    return value if isinstance(value, str) else dumps(value, ensure_ascii=False)
