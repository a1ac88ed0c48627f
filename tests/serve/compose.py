"""A compose file, and its services as processes on `Machines`: their own commands, variables, files and checks."""

import json
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from tests.end_to_end.commands import REPOSITORY
from tests.serve.machines import Machines

_PROGRAMS = {"chrislusf/seaweedfs": ["weed"]}
"""The programs of images that take arguments alone."""
_PATIENCE = 180.0


@dataclass(frozen=True)
class Compose:
    """A compose file with the values of its variables."""

    file: Path
    variables: Mapping[str, str]

    @cached_property
    def services(self) -> dict[str, dict[str, Any]]:
        """The services, with all variables replaced."""
        text = re.sub(r"\$\{(\w+)(?::([-?])([^}]*))?\}", self._value, self.file.read_text())
        return dict(yaml.safe_load(text)["services"])

    def _value(self, found: "re.Match[str]") -> str:
        name, kind, default = found.groups()
        if name in self.variables:
            return self.variables[name]
        assert kind == "-", f"{name} is not set"
        return str(default)

    def order(self) -> list[str]:
        """The services, each after those that it depends on."""
        return list(TopologicalSorter({name: self.conditions(name) for name in self.services}).static_order())

    def conditions(self, name: str) -> dict[str, str]:
        """What a service waits for: other services, and the condition of each."""
        waits = self.services[name].get("depends_on", {})
        if isinstance(waits, list):
            return dict.fromkeys(waits, "service_started")
        return {other: one["condition"] for other, one in waits.items()}

    def command(self, name: str) -> list[str]:
        """The command line of a service."""
        service = self.services[name]
        if "command" not in service:
            return list(json.loads(of_image("CMD")))
        image = service.get("image", "").partition(":")[0]
        return [*_PROGRAMS.get(image, ()), *shlex.split(service["command"])]

    def check(self, name: str) -> list[str] | None:
        """The command that says whether a service is healthy; None if it has none."""
        service = self.services[name]
        if service.get("healthcheck", {}).get("disable"):
            return None
        if "healthcheck" in service:
            kind, *command = service["healthcheck"]["test"]
            assert kind == "CMD"
            return list(command)
        return list(json.loads(of_image("HEALTHCHECK .*CMD"))) if "build" in service else None

    def volumes(self, folder: Path) -> Iterator[tuple[Path, str]]:
        """The paths here and the paths there of all services. Named volumes are made in a folder."""
        listed = {one for each in self.services.values() for one in each.get("volumes", ())}
        pairs = [one.removesuffix(":ro").split(":") for one in listed]
        for here, there in sorted(pairs, key=lambda pair: pair[1]):
            if here.startswith((".", "/")):
                yield (self.file.parent / here).resolve(), there
            else:
                (folder / here).mkdir()
                yield folder / here, there


def of_image(instruction: str) -> str:
    """The list of an instruction of the Dockerfile."""
    (found,) = re.findall(rf"^{instruction} (\[.+\])$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    return str(found)


class Cluster:
    """The services of a compose file, each on a machine of its own."""

    def __init__(self, compose: Compose, machines: Machines, logs: Path, variables: Mapping[str, str]) -> None:
        self._compose, self._machines, self._logs, self._variables = compose, machines, logs, variables
        self._running = dict[str, "subprocess.Popen[bytes]"]()
        self._opened = ExitStack()

    def up(self, *wanted: tuple[str, str]) -> None:
        """Start services, each on a machine, as soon as those that it depends on are ready; then wait for all."""
        for service, machine in wanted:
            for other, condition in self._compose.conditions(service).items():
                assert other in self._running, f"{service} needs {other}"
                if condition == "service_healthy":
                    self._wait(other, other)
            log = self._opened.enter_context((self._logs / machine).open("wb"))
            command = self._line(service, machine, self._compose.command(service))
            self._running[machine] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        for service, machine in wanted:
            self._wait(service, machine)

    def _wait(self, service: str, machine: str) -> None:
        """Wait until a service is healthy, if it can tell."""
        check, until = self._compose.check(service), time.monotonic() + _PATIENCE
        while check and self.run(service, check, machine).returncode:
            assert self._running[machine].poll() is None, (self._logs / machine).read_text()[-2000:]
            assert time.monotonic() < until, (self._logs / machine).read_text()[-2000:]
            time.sleep(1)

    def run(
        self, service: str, command: list[str] | None = None, machine: str | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command, or the service's own, to its end with all that a service has."""
        line = self._line(service, machine or service, command or self._compose.command(service))
        return subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)

    def alive(self) -> dict[str, bool]:
        """Does each service still run?"""
        return {name: process.poll() is None for name, process in self._running.items()}

    def _line(self, service: str, machine: str, command: list[str]) -> list[str]:
        own = self._compose.services[service].get("environment", {})
        folder = "/bank" if "build" in self._compose.services[service] else "/"
        return self._machines.command(machine, command, {**self._variables, **own}, folder)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()
        self._opened.close()
