"""Runs cases one by one, each in a process of its own that is forked from one which has imported everything.

`_main` is that process: it reads the names of cases from standard input and answers each with one line. A case
is a function ``module:name`` that takes a `Place` with a copy of the bank, and whatever argument follows; it returns
text. How it ended, what it took and whether it had to be stopped is seen from outside.
"""

import gc
import json
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.forked import Program

PROGRAM = """
import os, pathlib, sys
from tests.hostile.nursery import _main

os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a library says of a hostile bank is no answer
_main(pathlib.Path(sys.argv[1]))
"""
LIMIT_S = 30.0
LIMIT_DATA = 4 << 30
"""Keeps the machine alive where a case wants all of its memory. What a case may take is held against its peak."""


@dataclass(frozen=True)
class Ended:
    """How a case ended."""

    how: str
    """``returned``, ``raised``, ``died`` (of a signal, or without a word) or ``hung``."""
    text: str
    """What it returned, its error as ``Name: message``, or the signal."""
    typed: bool
    """Whether the error is an `M3Error`."""
    peak_bytes: int
    """Resident memory at the most, above what it began with."""


class Nursery:
    """The process, as its parent sees it."""

    def __init__(self, folder: Path) -> None:
        self._process = Program(PROGRAM, folder)

    def run(self, case: str, argument: Any = None, limit_s: float = LIMIT_S) -> Ended:
        """Run ``module:name`` in a place of its own."""
        return Ended(**json.loads(self._process.ask(json.dumps([case, argument, limit_s]))))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.__exit__(kind, error, at)


def _main(folder: Path) -> None:
    kernels = import_module("m3runtime.codecs.product.kernels.by_numba")
    kernels.scatter()  # compiled once, not in every child
    banks = import_module("tests.hostile.banks")
    pristine = folder / "pristine"
    made = _forked("tests.hostile.cases:make", None, pristine, 120.0)
    assert made.how == "returned", made
    shutil.copytree(pristine, folder / "warm")
    warm = banks.Place(folder / "warm")
    banks.serve(warm)  # a first use imports and looks up half of what a case takes
    for command in ("inspect", "search owl", "codec report bank/codec.safetensors", "verify --repair", "forget 0"):
        warm.m3(*command.split())
    gc.freeze()  # or each child would look for garbage in all of that, and copy its pages
    for count, line in enumerate(sys.stdin):
        case, argument, limit_s = json.loads(line)
        own = folder / str(count)
        shutil.copytree(pristine, own)
        ended = _forked(case, argument, own, limit_s)
        shutil.rmtree(own)
        print(json.dumps(ended.__dict__), flush=True)  # noqa: T201 - the answer


def _forked(case: str, argument: Any, folder: Path, limit_s: float) -> Ended:
    module, _, name = case.partition(":")
    work = getattr(import_module(module), name)
    result = folder.with_name(f"{folder.name}.json")
    result.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        _run(work, argument, folder, result)
    began = time.monotonic()
    stopped = False
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if not stopped and time.monotonic() - began > limit_s:
            os.kill(child, signal.SIGKILL)
            stopped = True
        time.sleep(0.002)
    answer = json.loads(result.read_text()) if result.exists() else {"start": 0}
    peak = used.ru_maxrss * 1024 - answer.pop("start")
    if stopped:
        return Ended("hung", f"longer than {limit_s} s", False, peak)
    if "how" not in answer:
        return Ended("died", f"status {status}", False, peak)
    return Ended(**answer, peak_bytes=peak)


def _run(work: Any, argument: Any, folder: Path, result: Path) -> None:
    """The child's life, which ends here."""
    from m3runtime.errors import M3Error
    from tests.end_to_end.commands import Place

    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result.write_text(json.dumps({"start": start}))
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_DATA, LIMIT_DATA))
    try:
        answer = {"how": "returned", "text": str(work(Place(folder), argument)), "typed": True}
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is told
        text = f"{type(error).__name__}: {error}"
        if not isinstance(error, M3Error):
            import traceback

            text += "\n" + traceback.format_exc()
        answer = {"how": "raised", "text": text, "typed": isinstance(error, M3Error)}
    temporary = result.with_suffix(".part")
    temporary.write_text(json.dumps({**answer, "start": start}))
    temporary.replace(result)
    os._exit(0)
