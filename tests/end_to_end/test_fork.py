"""A process that was forked from one with an open runtime says so, instead of waiting for threads it does not have."""

import subprocess
import sys

from tests.end_to_end.commands import Place, environment

SCRIPT = """
import os, signal, sys
from m3runtime import Runtime
from m3runtime.errors import ForkedError

with Runtime.open("m3.yaml") as runtime, runtime.stream() as stream:
    stream.recall("What does the harbour lamp burn?", wait=True)
    stream.hint("ferry")
    child = os.fork()
    if not child:
        signal.alarm(60)
        for use in (
            lambda: stream.recall("ferry"),
            lambda: stream.hint("ferry"),
            lambda: runtime.search(["ferry"]),
            lambda: runtime.forget([0]),
        ):
            try:
                use()
            except ForkedError as error:
                print(error, flush=True)
        stream.close()
        runtime.close()
        with Runtime.open("m3.yaml", read_only=True) as own:
            print(len(own.search(["harbour lamp"])[0]) > 0, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print(len(stream.recall("ferry", wait=True)) > 0)
"""


def test_a_forked_process_says_so(written: Place) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=written.folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    line = "the runtime was opened before this process forked; open one in this process, or start it with spawn"
    assert done.stdout.splitlines() == [line] * 4 + ["True", "True"]
