"""The documents are true of the code."""

from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from m3runtime.config.schema import Config

DOCS = Path(__file__).parents[2] / "docs"


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        inner = [kind for kind in kinds if issubclass(kind, BaseModel) and not name.startswith("tiers")]
        found += keys(inner[0], f"{prefix}{name}.") if inner else [prefix + name]
    return found


def test_every_key_of_the_configuration_is_described_and_no_other():
    lines = (DOCS / "configuration.md").read_text().splitlines()
    described = [line.split("`")[1] for line in lines if line.startswith("| `") and "." in line.split("`")[1]]
    described += [line.split("`")[1] for line in lines if line.startswith(("| `bank`", "| `tiers` | `[]`"))]
    assert sorted(described) == sorted(keys(Config))
