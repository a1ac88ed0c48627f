"""Prints pip constraints: the lowest version that pyproject.toml allows of every dependency but torch and triton.

These two come as builds of gigabytes or none at all for old versions, so that their choice is left to the caller.
"""

import re
import tomllib
from itertools import chain
from pathlib import Path

LEFT_OUT = ("m3runtime", "torch", "triton")

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
requirements = {*project["dependencies"], *chain(*project["optional-dependencies"].values())}
for requirement in sorted(requirements):
    name = re.split(r"[\[<>=;]", requirement)[0]
    bound = re.search(r">=([\w.]+)", requirement)
    if name not in LEFT_OUT:
        if bound is None:
            raise SystemExit(f"pyproject.toml: {name} has no lower bound")
        print(f"{name}=={bound[1]}")
