"""A process that has compiled everything, and forks an ``m3`` whenever it is asked to: one that can be killed."""

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.end_to_end.commands import Place, Result
from tests.forked import Program

# Compiles everything once, then forks an `m3` for every line it reads, and says how it ended.
# Moments are numbers of calls of Python and C functions in the main thread: a command makes the same ones each time.
# It would not if it compiled, whose results numba keeps in files; nor would most moments be the command's own then.
NURSERY = """
import contextlib, gc, json, os, signal, sys, time
import tests.preloaded
from m3runtime import cli
import m3runtime.codecs.product.kernels.sharing

with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):
    cli.app(["write", "--help"])
if m3runtime.codecs.product.kernels.sharing.compiled():
    from m3runtime.codecs.product.kernels import by_numba
    by_numba.nearest_of(8), by_numba.look_up_of(by_numba.unit_of(8)), by_numba.scatter()
    from m3runtime.codecs.product.codec import ProductCodec
    from m3runtime.testing.codec import SPEC, make_memories
    memories = make_memories([12] * 24)
    codec = ProductCodec(SPEC, key_bytes=2, value_bytes=2)
    codec.fit(memories)
    codec.distortion(memories)  # in the first call of a kernel numba takes an interrupt for a TypeError

BEGINS = {"train_planned": "codec", "reencode": "reencoding",
          "Bank.create": "creation", "Pipeline.run": "commits", "BankIndex.save": "index",
          "_Repair.mend": "repair", "_Repair._compute": "computing", "Moves.make": "forgetting",
          "KeptTier.discard": "tiers", "begin": "begun", "LmdbHome.compact": "compacting",
          "Erasures.with_one_done": "recording"}

def everything():
    kernels = sys.modules.get("m3runtime.codecs.product.kernels.by_numba")
    names = ("nearest_of", "look_up_of", "scatter") if kernels else ()
    return {*sys.modules, *((name, getattr(kernels, name).cache_info().currsize) for name in names)}

class Finalised:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

def live(say, folder, arguments, moment, signal_number, delay):
    os.chdir(folder)
    sys.argv = ["m3", *arguments]
    sys.stdout, sys.stderr = open("stdout", "w"), open("stderr", "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    count, phases, ready = 0, {"reading": 0}, everything()

    def watch(frame, event, _):
        nonlocal count
        count += 1
        if moment is None and event == "call" and frame.f_code.co_qualname in BEGINS:
            phases.setdefault(BEGINS[frame.f_code.co_qualname], count)
        if count == moment:
            sys.setprofile(None)
            if signal_number == signal.SIGKILL and delay is not None:
                os.write(say, b"now")
            elif signal_number == signal.SIGINT and delay is None:
                Finalised()  # Python cannot raise what comes up in there
            else:
                os.kill(os.getpid(), signal_number)

    sys.setprofile(watch if moment != 0 else None)
    try:
        cli.main()
        code = 0
    except SystemExit as exit:
        code = exit.code or 0
    sys.setprofile(None)
    if moment is None:
        os.write(say, json.dumps([phases, count, [str(one) for one in everything() - ready]]).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

gc.freeze()
for line in sys.stdin:
    folder, arguments, moment, signal_number, delay = json.loads(line)
    hear, say = os.pipe()
    child = os.fork()
    if not child:
        live(say, folder, arguments, moment, signal_number, delay)
    os.close(say)
    heard = os.read(hear, 1 << 16)  # nothing, if it ended without a word
    if heard == b"now":
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        heard = b""
    _, status = os.waitpid(child, 0)
    os.close(hear)
    print(json.dumps([os.waitstatus_to_exitcode(status), json.loads(heard or "null")]), flush=True)
"""


@dataclass
class Nursery:
    """Runs ``m3`` as processes of their own, one at a time, in the environment that the tests began with."""

    process: Program

    def run(
        self,
        place: Place,
        moment: int | None = 0,
        *,
        arguments: Sequence[str] = ("write", "corpus.jsonl", "--json"),
        signal_number: int = signal.SIGKILL,
        delay: float | None = 0,
    ) -> tuple[int, Any]:
        """The exit code of a command that gets a signal at a moment; without a moment, its phases and their end too,
        and what it still had to import or compile.

        SIGKILL comes ``delay`` seconds later, wherever the command is by then; with None, at that very moment. SIGINT
        comes at that very moment; with None, in a finaliser.
        """
        order = [str(place.folder), list(arguments), moment, signal_number, delay]
        code, said = json.loads(self.process.ask(json.dumps(order)))
        return code, said

    def m3(self, place: Place, *arguments: object) -> Result:
        """Run a command as `Place.process` does, but without importing everything anew."""
        code, _ = self.run(place, arguments=[str(one) for one in arguments])
        return Result(code, (place.folder / "stdout").read_text(), errors(place))


def errors(place: Place) -> str:
    return (place.folder / "stderr").read_text()
