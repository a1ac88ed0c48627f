"""The Dockerfile, as far as it can be seen without Docker."""

import json
import re
import tomllib

from m3runtime.config.schema import Config
from tests.end_to_end.commands import REPOSITORY

TEXT = (REPOSITORY / "Dockerfile").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_an_image_has_all_that_the_wheel_is_built_from() -> None:
    copied = {name for names in re.findall(r"^COPY (?!--)(.+) \S+$", TEXT, re.MULTILINE) for name in names.split()}
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    folders = {package.partition("/")[0] for package in packages}
    assert copied >= {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], *folders}
    assert [name for name in copied if not (REPOSITORY / name).exists()] == []
    (extras,) = re.findall(r'"\.\[(.+)\$\{EXTRAS:\+,\$EXTRAS\}\]"', TEXT)
    assert {"serve", "transformers"} <= set(extras.split(",")) <= PROJECT["project"]["optional-dependencies"].keys()


def test_an_image_serves_on_all_addresses_where_it_says_so() -> None:
    (command,) = re.findall(r"^CMD (\[.+\])$", TEXT, re.MULTILINE)
    program, serve, *options = json.loads(command)
    assert (program, serve) == ("m3", "serve")
    given = dict(zip(options[::2], options[1::2], strict=True))
    config = Config.model_fields["serve"].annotation
    assert {name.removeprefix("--") for name in given} <= config.model_fields.keys()  # type: ignore[union-attr]
    assert given["--address"] == "0.0.0.0"
    assert f"EXPOSE {given['--port']}\n" in TEXT
    assert f"127.0.0.1:{given['--port']}/health/ready" in TEXT
