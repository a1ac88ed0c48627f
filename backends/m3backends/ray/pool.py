"""`RayPool`: encoders that are actors on a Ray cluster."""

import logging
import os
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError

from m3runtime.config.schema import Config
from m3runtime.errors import ConfigError, EncoderError
from m3runtime.plugins.messages import one_line
from m3runtime.writing.encoders.encoder import Encoded, Encoder, Failed, Setup, Task
from m3runtime.writing.encoders.pool import EncoderPool, Lost

_OF_A_NEW_CLUSTER = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
    "RAY_worker_niceness": "0",  # 15 leaves actors what others of the machine do not want, while the driver waits
}
"""Variables of a cluster that is started here. One that runs already has its own."""
_PATIENCE = 10.0
"""Seconds for a connection to a cluster."""


@dataclass(frozen=True)
class _Actor:
    handle: Any
    answers: deque[Any] = field(default_factory=deque)
    """A future for each task that it was given, in order."""


class RayPool(EncoderPool):
    """One actor for each GPU of a cluster; without any, one for each machine, with an equal share of all CPU threads.

    Every machine needs m3runtime with the same plug-ins, and the model and the embedder at the paths of the
    configuration. None needs the bank: actors return blocks. A cluster that the program has joined already is used,
    and stays joined.
    """

    def __init__(self, *, address: str, size: int | None = None) -> None:
        """``size`` is the number of actors; None: as many as there are GPUs, or machines."""
        self._address = address
        self._wanted = size
        self._is_ours = False
        self._kind: Any = None
        self._setup: tuple[Setup, Any] | None = None
        self._device, self._threads = "cpu", 1
        self._actors: dict[int, _Actor] = {}

    def open(self, config: Config, device: torch.device) -> None:  # noqa: ARG002 - the cluster says what there is
        """Join the cluster; see `EncoderPool.open`."""
        if not ray.is_initialized():
            for name, value in _OF_A_NEW_CLUSTER.items():
                os.environ.setdefault(name, value)
            try:
                _reach(self._address)
                ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
            except (RayError, OSError, ValueError, RuntimeError) as error:
                raise ConfigError(f"--ray {self._address}: {one_line(error)}") from error
            self._is_ours = True
        resources: dict[str, float] = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        on_gpus = gpus > 0 and device.type != "cpu"
        most = gpus if on_gpus else cpus
        nodes: list[dict[str, Any]] = ray.nodes()
        self.size = self._wanted or (gpus if on_gpus else max(1, sum(_computes(node) for node in nodes)))
        if self.size > most:
            raise ConfigError(f"--ray {self._address} has {most} {'GPUs' if on_gpus else 'CPUs'}, not {self.size}")
        self._device = "auto" if on_gpus else "cpu"  # each actor sees its own GPU alone
        self._threads = max(1, cpus // self.size)
        kind = ray.remote(num_cpus=1, num_gpus=int(on_gpus), max_restarts=0, scheduling_strategy="SPREAD")
        self._kind = kind(Encoder)

    def start(self, number: int, setup: Setup) -> None:
        """Start an actor; see `EncoderPool.start`."""
        if self._setup is None or self._setup[0] is not setup:
            self._setup = setup, ray.put(setup)
        kind = "CPU" if self._device == "cpu" else "GPU"
        if len(self._actors) >= int(ray.cluster_resources().get(kind, 0)):
            raise EncoderError(
                f"--ray {self._address}: a machine was lost, and no {kind} is left for its encoder; write again"
            )
        self._actors[number] = _Actor(self._kind.remote(self._setup[1], self._device, self._threads))

    def give(self, number: int, task: Task) -> None:
        """Call an actor; see `EncoderPool.give`."""
        actor = self._actors[number]
        actor.answers.append(actor.handle.attempt.remote(task))

    def wait(self) -> Sequence[tuple[int, Encoded | Failed | Lost]]:
        """Wait for an answer; see `EncoderPool.wait`."""
        first = {actor.answers[0]: number for number, actor in self._actors.items() if actor.answers}
        ready, _ = ray.wait(list(first), num_returns=1)
        return [(first[one], self._hear(first[one])) for one in ready]

    def close(self) -> None:
        """Kill all actors, and leave the cluster unless the program had joined it."""
        while self._actors:
            with suppress(RayError):  # it is dead
                ray.kill(self._actors.popitem()[1].handle)
        self._setup = self._kind = None
        if self._is_ours:
            ray.shutdown()
            self._is_ours = False

    def _hear(self, number: int) -> Encoded | Failed | Lost:
        try:
            answer: Encoded | Failed = ray.get(self._actors[number].answers.popleft())
        except RayError as error:  # of the actor, its machine, or its object store: none of the task's
            actor = self._actors.pop(number)
            with suppress(RayError):
                ray.kill(actor.handle)
            return Lost(f"{type(error).__name__}: {one_line(error)}")
        if isinstance(answer, Encoded):  # what lies in Ray's store cannot be written
            blocks = None if answer.blocks is None else np.array(answer.blocks)
            vectors = None if answer.vectors is None else np.array(answer.vectors)
            return replace(answer, blocks=blocks, vectors=vectors)
        return answer


def _computes(node: dict[str, Any]) -> bool:
    """Is a machine of the cluster there, and for computing? The head of a cluster often is not."""
    return bool(node["Alive"]) and node["Resources"].get("CPU", 0) > 0


def _reach(address: str) -> None:
    """Raise `OSError` if nothing answers at a host and port. Ray itself would try for minutes, and then abort."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
