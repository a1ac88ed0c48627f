"""`ProcessPool`: encoders in processes of this machine, which are started anew and share nothing."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from tempfile import TemporaryFile
from typing import IO, Any

import torch

from m3runtime.config.schema import Config
from m3runtime.plugins.messages import one_line
from m3runtime.writing.encoders.encoder import Encoded, Failed, Setup, Task
from m3runtime.writing.encoders.pool import EncoderPool, Lost

_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from m3runtime.writing.encoders.process import serve
serve(int(sys.argv[1]))
"""
_PATIENCE = 1.0
"""Seconds for a process whose connection has ended to end by itself, and say why."""
_TAIL = 4096
"""Bytes at the end of what a process printed that may tell why it died."""


@dataclass(frozen=True)
class _Process:
    process: "subprocess.Popen[bytes]"
    connection: "Connection[Any, Any]"
    printed: IO[bytes]

    def end(self, patience: float = 0) -> str:
        """End it, unless it ends by itself within so many seconds. Returns how it ended."""
        self.connection.close()
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.printed.seek(max(0, self.printed.seek(0, 2) - _TAIL))
        lines = self.printed.read().decode("utf-8", "replace").split("\n")
        self.printed.close()
        last = next((line for line in reversed(lines) if line.strip()), "")
        how = f"exit status {code}" if code >= 0 else signal.strsignal(-code) or f"signal {-code}"
        return f"{how}: {one_line(last)}" if last else how


class ProcessPool(EncoderPool):
    """Processes on the devices of this machine: on its GPUs in turn, or with an equal share of a CPU's threads.

    They are in a session of their own, so that Ctrl-C on a terminal reaches the writer alone; and they end when the
    writer does, whatever ends it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._devices = [torch.device("cpu")]
        self._running: dict[int, _Process] = {}

    def open(self, config: Config, device: torch.device) -> None:
        """Choose the devices: the writer's, and all others of its kind unless ``model.device`` names a single one."""
        self._devices = [device]
        if device.type != "cpu" and config.model.device in ("auto", device.type):
            count = torch.accelerator.device_count()
            self._devices = [torch.device(device.type, (device.index + place) % count) for place in range(count)]

    def start(self, number: int, setup: Setup) -> None:
        """Start a process; see `EncoderPool.start`."""
        ours, theirs = Pipe()
        printed = TemporaryFile()  # noqa: SIM115 - `_Process.end` closes it
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                start_new_session=True,
            )
        self._running[number] = _Process(process, ours, printed)
        with suppress(OSError):  # it is dead already, and `wait` tells
            ours.send((setup, str(self._devices[number % len(self._devices)]), self._threads))

    def give(self, number: int, task: Task) -> None:
        """Send a task; see `EncoderPool.give`."""
        with suppress(OSError):
            self._running[number].connection.send(task)

    def wait(self) -> Sequence[tuple[int, Encoded | Failed | Lost]]:
        """Wait for answers; see `EncoderPool.wait`."""
        ready = wait([one.connection for one in self._running.values()])
        return [(number, self._hear(number)) for number, one in list(self._running.items()) if one.connection in ready]

    def close(self) -> None:
        """Kill all processes."""
        while self._running:
            self._running.popitem()[1].end()

    def _hear(self, number: int) -> Encoded | Failed | Lost:
        try:
            answer: Encoded | Failed = self._running[number].connection.recv()
        except (EOFError, OSError):
            return Lost(self._running.pop(number).end(_PATIENCE))
        return answer

    @property
    def _threads(self) -> int:
        return max(1, torch.get_num_threads() // self.size)
