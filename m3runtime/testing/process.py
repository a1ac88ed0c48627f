"""Another process that opens a home as a contract's subclass does.

It is told what to do by one dictionary each, and answers with one:

=====================================  =============================================================
``{"open": folder, "read_only": ...}``  ``{}``, or ``{"error": class, "message": ...}``
``{"look": null}``                      ``{"contents": digest of all that the home tells}``
``{"commit": [first, count, size]}``    ``{"committed": next id}`` for each of ``count`` batches
``{"write": [count, size]}``            ``{"committed": [first, count]}`` for each of ``count`` batches
                                        of ``size`` ids, which it reserved
``{"race": ids}``                       ``{"won": {id: own id}}``: those whose text it was the first to add
``{"fill": ids}``                       ``{"filled": ids}``: those that it gave a block
``{"reserve": counts}``                 ``{"reserved": first ids}``
``{"close": null}``                     ``{}``
=====================================  =============================================================
"""

import importlib.util
import inspect
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from m3runtime.errors import InputError, M3Error
from m3runtime.storage.home import Home
from m3runtime.testing.blocks import make_batch, make_blocks, make_ids, make_reference
from m3runtime.testing.home_contents import digest

if TYPE_CHECKING:
    from m3runtime.testing.home_laws import HomeLaws

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
if _METHOD == "forkserver":
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "m3runtime.testing.home"])


def forking() -> Any:
    """The context of `multiprocessing` for processes that are forked from one which imported this and opened nothing.

    They start in a twentieth of the time. Where the system cannot fork, they start as any other.
    """
    return multiprocessing.get_context(_METHOD)


class OtherProcess:
    """A process of its own for ``contract``, whose `HomeLaws.open` it calls on a bare instance of the class."""

    def __init__(self, contract: "type[HomeLaws]") -> None:
        context = forking()
        self._connection, there = context.Pipe()
        # The server that forks it may have been started in another environment.
        arguments = (inspect.getfile(contract), contract.__qualname__, dict(os.environ), there)
        self._process = context.Process(target=obey, args=arguments, daemon=True)
        self._process.start()
        there.close()

    def tell(self, what: str, how: Any = None, **more: Any) -> None:
        """Send an order. Each answer to it is to be taken by `hear`."""
        self._connection.send({what: how, **more})

    def hear(self) -> dict[str, Any]:
        """Wait for an answer."""
        for answer in self._answers():
            return answer
        self._process.join()
        raise AssertionError(f"the other process ended with {self._process.exitcode}")

    def ask(self, what: str, how: Any = None, **more: Any) -> dict[str, Any]:
        """Send an order and wait for its answer."""
        self.tell(what, how, **more)
        return self.hear()

    def stop(self) -> None:
        """Stop it in whatever it is doing, until `go_on`. Not on Windows."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> list[dict[str, Any]]:
        """End it at once, in whatever it is doing. Returns what it had answered until then."""
        self._process.kill()
        answers = list(self._answers())
        self._process.join()
        return answers

    def _answers(self) -> Iterator[dict[str, Any]]:
        """Its answers, until it ends."""
        try:
            while True:
                yield self._connection.recv()
        except (EOFError, OSError):
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._connection.close()
        self._process.join()
        self._process.close()


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


def _add(home: Home, id: int) -> int | None:
    """Add the reference of an id under a new id, and return that; None if its text is remembered."""
    own = home.reserve(1)
    try:
        home.commit(replace(make_batch([own]), references=[make_reference(id)]))
    except InputError:
        return None
    return own


def obey(
    file: str, name: str, environment: dict[str, str], connection: "Connection[dict[str, Any], dict[str, Any]]"
) -> None:
    """Do what is told on a connection until it ends, for the contract of this name in a file."""
    os.environ.update(environment)
    contract = load_contract(file, name)()
    home: Home | None = None
    while True:
        try:
            told = connection.recv()
        except EOFError:
            return
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
                    connection.send({"committed": start + size})
                continue
            elif "write" in told:
                count, size = told["write"]
                for _ in range(count):
                    first = home.reserve(size)
                    home.commit(make_batch(range(first, first + size)))
                    connection.send({"committed": [first, size]})
                continue
            elif "race" in told:
                answer = {"won": {id: own for id in told["race"] if (own := _add(home, id)) is not None}}
            elif "fill" in told:
                ids = make_ids(*told["fill"])
                answer = {"filled": [int(id) for id in ids if home.fill(make_ids(id), make_blocks(make_ids(id)))[0]]}
            elif "reserve" in told:
                answer = {"reserved": [home.reserve(count) for count in told["reserve"]]}
            else:
                home.close()
        except M3Error as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        connection.send(answer)
