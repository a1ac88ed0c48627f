"""Another process that opens a home as a contract's subclass does.

It is told what to do by one line of JSON each, and answers with one:

=====================================  =============================================================
``{"open": folder, "read_only": ...}``  ``{}``, or ``{"error": class, "message": ...}``
``{"look": null}``                      ``{"contents": digest of all that the home tells}``
``{"commit": [first, count, size]}``    ``{"committed": next id}`` for each of ``count`` batches
``{"close": null}``                     ``{}``
=====================================  =============================================================
"""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from m3runtime.errors import M3Error
from m3runtime.storage.home import Home
from m3runtime.testing.blocks import make_batch
from m3runtime.testing.home_contents import digest

if TYPE_CHECKING:
    from m3runtime.testing.home_laws import HomeLaws


class OtherProcess:
    """A process of its own for ``contract``, whose `HomeLaws.open` it calls on a bare instance of the class."""

    def __init__(self, contract: "type[HomeLaws]") -> None:
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, inspect.getfile(contract), contract.__qualname__],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, what: str, how: Any = None, **more: Any) -> None:
        """Send a line. Each answer to it is to be taken by `hear`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({what: how, **more}) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Wait for an answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the other process ended with {self._process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, what: str, how: Any = None, **more: Any) -> dict[str, Any]:
        """Send a line and wait for its answer."""
        self.tell(what, how, **more)
        return self.hear()

    def kill(self) -> list[dict[str, Any]]:
        """End it at once, in whatever it is doing. Returns what it had answered until then."""
        self._process.kill()
        assert self._process.stdout is not None
        lines = self._process.stdout.readlines()
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()


def load_contract(file: str, name: str) -> "type[HomeLaws]":
    """The class of this qualified name in a file, wherever the file lies."""
    spec = importlib.util.spec_from_file_location("contract", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["contract"] = module
    spec.loader.exec_module(module)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    contract: type[HomeLaws] = found
    return contract


def obey(contract: "HomeLaws") -> None:
    """Do what is told on standard input until it ends."""
    home: Home | None = None
    for line in sys.stdin:
        told = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if "open" in told:
                home = contract.open(Path(told["open"]), read_only=told["read_only"])
            elif home is None:
                answer = {"error": "no home is open"}
            elif "look" in told:
                answer = {"contents": digest(home)}
            elif "commit" in told:
                first, count, size = told["commit"]
                for start in range(first, first + count * size, size):
                    home.commit(make_batch(range(start, start + size)))
                    _say({"committed": start + size})
                continue
            else:
                home.close()
        except M3Error as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        _say(answer)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    obey(load_contract(sys.argv[1], sys.argv[2])())
