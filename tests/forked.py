"""Programs in processes of their own, which are forked from one that has imported `tests.preloaded`."""

import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self, TextIO

from m3runtime.testing.process import forking


class Program:
    """A process that runs ``code`` with arguments in ``sys.argv``. What it writes to either output comes in one."""

    def __init__(self, code: str, *arguments: object, folder: Path | None = None) -> None:
        context = forking()
        its_input, our_output = context.Pipe(duplex=False)
        our_input, its_output = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_live, args=(code, [*map(str, arguments)], folder, its_input, its_output), daemon=True
        )
        self._process.start()
        self.stdin: TextIO = os.fdopen(os.dup(our_output.fileno()), "w")
        self.stdout: TextIO = os.fdopen(os.dup(our_input.fileno()))
        for connection in (its_input, its_output, our_input, our_output):
            connection.close()

    def ask(self, line: str = "") -> str:
        """Send a line and wait for one."""
        self.stdin.write(f"{line}\n")
        self.stdin.flush()
        return self.stdout.readline()

    def wait(self) -> int:
        """Its exit code; the negative number of a signal that ended it."""
        self._process.join()
        code: int = self._process.exitcode
        return code

    def terminate(self) -> None:
        """Ask it to end, by SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()
        self._process.close()
        self.stdout.close()
        self.stdin.close()


def run(code: str, *arguments: object, folder: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Let a program run to its end, in this folder."""
    with Program(code, *arguments, folder=folder) as program:
        said = program.stdout.read()
        return subprocess.CompletedProcess(code, program.wait(), said)


def _live(
    code: str,
    arguments: list[str],
    folder: Path | None,
    stdin: "Connection[Any, Any]",
    stdout: "Connection[Any, Any]",
) -> None:
    os.dup2(stdin.fileno(), 0)
    os.dup2(stdout.fileno(), 1)
    os.dup2(stdout.fileno(), 2)
    for connection in (stdin, stdout):
        connection.close()
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w")))
    sys.argv = ["-c", *arguments]
    os.chdir(folder or Path.cwd())
    exec(code, {"__name__": "__main__"})
