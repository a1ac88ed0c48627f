"""Values as YAML, for the configurations that tests write."""

from io import StringIO
from typing import Any

from ruamel.yaml import YAML


def dumped(value: Any) -> str:
    """The value as a YAML document, one key a line."""
    text, yaml = StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(value, text)
    return text.getvalue()
