"""The files of `deploy/`: they are valid, and fit each other. `tests/serve/test_compose.py` runs them."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from m3runtime import cli
from m3runtime.config.schema import Config
from tests.serve.compose import Compose

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
REQUIRED = ("M3_KEYS", "M3_STORE_KEY", "M3_STORE_SECRET")
COMPOSE = Compose(DEPLOY / "compose.yaml", dict.fromkeys(REQUIRED, "given"))


def test_the_configuration_is_that_of_the_services() -> None:
    services, config = COMPOSE.services, Config.load(DEPLOY / "m3.yaml", {})
    assert [tier.kind for tier in config.tiers] == ["pinned", "valkey", "lance"]
    assert str(config.tiers[1].options["url"]).partition("//")[2].partition(":")[0] in services
    assert str(config.tiers[2].options["url"]).split("/")[2] == services["store"]["environment"]["S3_BUCKET"]
    assert "AWS_ENDPOINT" in services["server"]["environment"]  # a merged mapping, with the keys of the server


def test_services_wait_for_those_that_can_say_that_they_are_ready() -> None:
    assert set(COMPOSE.order()) == COMPOSE.services.keys()
    for name in COMPOSE.services:
        for other, condition in COMPOSE.conditions(name).items():
            if condition == "service_healthy":
                assert COMPOSE.check(other), other
            else:
                assert condition == "service_started"


def test_images_are_named_with_a_version_or_built_with_extras_that_there_are() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for service in COMPOSE.services.values():
        if "image" in service:
            assert re.fullmatch(r"\S+/\S+:\d\S*", service["image"])
        else:
            assert (DEPLOY / service["build"]["context"] / "Dockerfile").is_file()
            assert set(service["build"]["args"]["EXTRAS"].split(",")) <= extras.keys()


def test_files_are_there_and_volumes_declared() -> None:
    declared = yaml.safe_load(COMPOSE.file.read_text())["volumes"]
    for service in COMPOSE.services.values():
        for volume in service.get("volumes", ()):
            here, there = volume.removesuffix(":ro").split(":")
            assert there.startswith("/")
            assert here in declared or (DEPLOY / here).exists() or here in ("./models", "./texts")


@pytest.mark.parametrize("name", [name for name, one in COMPOSE.services.items() if "build" in one])
def test_commands_of_ours_are_understood(name: str) -> None:
    program, command, *arguments = COMPOSE.command(name)
    if program == "m3":
        typer.main.get_command(cli.app).commands[command].make_context(command, arguments)
    else:
        pytest.importorskip("ray")
        from ray.scripts.scripts import cli as of_ray

        assert program == "ray"
        of_ray.commands[command].make_context(command, arguments)


def test_each_server_has_a_port_of_this_machine() -> None:
    (ports,) = COMPOSE.services["server"]["ports"]
    first, last, inside = map(int, re.fullmatch(r"(\d+)-(\d+):(\d+)", ports).groups())
    assert last - first + 1 == COMPOSE.services["server"]["deploy"]["replicas"]
    assert COMPOSE.command("server")[-1] == str(inside)


def test_the_commands_in_the_file_are_about_its_services() -> None:
    lines = re.findall(r"^#   docker compose -f deploy/compose.yaml (.+?)(?: +#.*)?$", COMPOSE.file.read_text(), re.M)
    assert [line.split()[0] for line in lines] == ["run", "up", "exec", "up", "run"]
    for line in lines:
        named = [word for word in shlex.split(line)[1:] if not word.startswith("-")]
        services = named if line.startswith("up") else named[:1]
        assert set(services) <= COMPOSE.services.keys()
    exported = re.findall(r"^#   export (.+)$", COMPOSE.file.read_text(), re.M)[0]
    assert set(re.findall(r"(\w+)=", exported)) == set(REQUIRED)
