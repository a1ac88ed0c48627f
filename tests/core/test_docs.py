"""The documents are true of the code."""

from pathlib import Path

from pydantic import BaseModel

from m3runtime.config import Config

DOCS = Path(__file__).parents[2] / "docs"


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += keys(kind, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def test_every_key_of_the_configuration_is_described_and_no_other():
    lines = (DOCS / "configuration.md").read_text().splitlines()
    described = [line.split("`")[1] for line in lines if line.startswith("| `") and "." in line.split("`")[1]]
    described += [line.split("`")[1] for line in lines if line.startswith(("| `bank`", "| `tiers` | `[]`"))]
    assert sorted(described) == sorted(keys(Config))
