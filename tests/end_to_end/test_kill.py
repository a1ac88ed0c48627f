"""``m3 write`` is killed or interrupted at any moment. What is left is whole, and writing again completes it."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from m3runtime.errors import BankMissingError
from m3runtime.writing.encoding import GROUP
from tests.end_to_end.commands import Contents, Place, environment, records
from tests.end_to_end.conftest import NewPlace

COUNT = 5 * GROUP + 7
CORPUS = records(f"Keeper {number} lit it on day {number * 37 % 1000}." for number in range(COUNT))
PHASES = ("reading", "creation", "commits", "codec", "index")

# Imports and compiles everything once, then forks an `m3` for every line it reads, and says how it ended.
# Moments are numbers of calls of Python and C functions in the main thread: a command makes the same ones each time.
# It would not if it compiled, whose results numba keeps in files; nor would most moments be the command's own then.
NURSERY = """
import contextlib, json, os, signal, sys, time
from m3runtime import cli
from m3runtime.writing import writer
import faiss, lmdb, m3backends.lmdb.home, m3backends.slabs, m3backends.usearch.index, m3model.transformers
import usearch.index
import m3runtime.writing.mirror, m3runtime.writing.forgetting
import m3model.memory3, m3model.attention.passes, m3runtime.codecs.product.kernels.sharing
import m3runtime.codecs.product.codec, m3runtime.codecs.product.kmeans, m3runtime.config.loading
import encodings.utf_8_sig, html, lmdb._envid, rich.progress, tests.end_to_end.embedders
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
import transformers.modeling_gguf_pytorch_utils

with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):
    cli.app(["write", "--help"])
if m3runtime.codecs.product.kernels.sharing.compiled():
    from m3runtime.codecs.product.kernels import by_numba
    by_numba.nearest_of(8), by_numba.scatter()

BEGINS = {"train_planned": "codec", "Bank.create": "creation", "Pipeline.run": "commits", "BankIndex.save": "index",
          "_Repair.mend": "repair", "_Repair._compute": "computing", "Moves.make": "forgetting",
          "KeptTier.discard": "tiers", "begin": "begun", "LmdbHome.compact": "compacting",
          "Erasures.with_one_done": "recording"}

def everything():
    kernels = sys.modules.get("m3runtime.codecs.product.kernels.by_numba")
    return {*sys.modules, kernels and kernels.nearest_of.cache_info().currsize}

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
    """Runs ``m3`` as processes of their own, one at a time."""

    process: "subprocess.Popen[str]"

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
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = [str(place.folder), list(arguments), moment, signal_number, delay]
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        code, said = json.loads(self.process.stdout.readline())
        return code, said


@dataclass(frozen=True)
class Undisturbed:
    """A write that nobody disturbed."""

    contents: Contents
    phases: dict[str, range]
    """The moments of each phase."""


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        yield Nursery(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def places(tmp_path: Path, new_place: NewPlace) -> Iterator[Place]:
    """New places of the same corpus, without end."""

    def make() -> Iterator[Place]:
        for number in range(1000):
            place = new_place(tmp_path / str(number))
            place.configure(
                memory={"layers": [0, 2]},
                codec={"kind": "product", "key_bytes": 2, "value_bytes": 2, "scope": "layer", "sample_tokens": 2500},
                embedder={"dim": 32},
            )
            place.text("corpus.jsonl", CORPUS)
            yield place

    return make()


@pytest.fixture
def undisturbed(nursery: Nursery, places: Iterator[Place]) -> Undisturbed:
    place = next(places)
    code, said = nursery.run(place, None)
    assert code == 0, errors(place)
    begins, end, late = said
    assert not late, "the nursery is there to have done that"
    begins = {name: moment for name, moment in begins.items() if name in PHASES}
    assert list(begins) == list(PHASES)
    bounds = [*begins.values(), end]
    return Undisturbed(place.contents(), {name: range(*bounds[i : i + 2]) for i, name in enumerate(PHASES)})


def errors(place: Place) -> str:
    return (place.folder / "stderr").read_text()


def sample_of(whole: Contents) -> int:
    """The number of references that a codec was trained on: their blocks come first, and are of another codec."""
    codecs = [block[40:48] for _, block in sorted(whole.blocks.items())]
    assert codecs[0] != codecs[-1]
    return next(place for place, codec in enumerate(codecs) if codec != codecs[0])


def check(place: Place, undisturbed: Contents) -> int:
    """Fail unless what an interrupted writer left is a beginning of the whole. Returns how much is there."""
    try:
        left = place.contents()
    except BankMissingError:
        assert not (place.bank / "home").exists()
        return 0
    count = left.next_id
    sampled = sample_of(undisturbed)
    assert count in {*range(0, sampled, GROUP), *range(sampled, COUNT, GROUP), COUNT}
    assert left.manifest == undisturbed.manifest or (json.loads(left.manifest)["planned"] and count <= sampled)
    for mine, whole in (
        (left.blocks, undisturbed.blocks),
        (left.references, undisturbed.references),
        (left.embeddings, undisturbed.embeddings),
    ):
        assert list(mine) == list(range(count))
        assert mine.items() <= whole.items()  # type: ignore[operator]
    # Whatever became of the index: it is in line with the home.
    found = place.m3("search", "Keeper 3 lit it", "--json").json
    assert len(found) == min(5, count)
    return count


def check_completed(place: Place, nursery: Nursery, undisturbed: Contents, known: int) -> None:
    code, _ = nursery.run(place)
    assert code == 0, errors(place)
    report = json.loads((place.folder / "stdout").read_text())
    assert (report["known"], report["written"]) == (known, COUNT - known)
    assert place.contents() == undisturbed
    assert not (place.bank / "training").exists()
    third = next(id for id, one in undisturbed.references.items() if one.text.startswith("Keeper 3 "))
    assert place.m3("search", "Keeper 3 lit it on day 111", "-k", 1, "--json").json[0]["id"] == third


def kill_and_complete(
    nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed, kills: dict[str, int], seed: int
) -> None:
    random, killed = Random(seed), 0
    for phase, count in kills.items():
        for _ in range(count):
            place = next(places)
            known = 0
            # Sometimes the second try is killed as well.
            for moments in random.choice([[phase], [phase, phase]]):
                moment = random.choice(undisturbed.phases[moments])
                code, _ = nursery.run(place, moment, delay=random.random() ** 3 * 0.1)
                killed += code == -signal.SIGKILL
                assert code in (0, -signal.SIGKILL), errors(place)
                left = check(place, undisturbed.contents)
                assert left >= known
                known = left
            check_completed(place, nursery, undisturbed.contents, known)
    assert killed >= sum(kills.values()) // 2


def test_killed_at_any_moment(nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed) -> None:
    kills = {"codec": 2, "creation": 2, "commits": 3, "index": 1}
    kill_and_complete(nursery, places, undisturbed, kills, seed=1)


@pytest.mark.slow
def test_killed_at_many_moments(nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed) -> None:
    kills = {"reading": 2, "codec": 8, "creation": 10, "commits": 15, "index": 5}
    kill_and_complete(nursery, places, undisturbed, kills, seed=2)


def interrupt_and_complete(
    nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed, moments: list[int], delay: float | None = 0
) -> None:
    for moment in moments:
        place = next(places)
        code, _ = nursery.run(place, moment, signal_number=signal.SIGINT, delay=delay)
        assert (code, errors(place)) == (130, "m3: interrupted; nothing is half-written\n")
        assert (place.folder / "stdout").read_text() == ""
        known = check(place, undisturbed.contents)
        check_completed(place, nursery, undisturbed.contents, known)


def test_interrupted_by_ctrl_c(nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed) -> None:
    random = Random(3)
    moments = [random.choice(undisturbed.phases[phase]) for phase in ("reading", "codec", "commits")]
    interrupt_and_complete(nursery, places, undisturbed, moments)


def test_interrupted_where_python_cannot_raise(
    nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed
) -> None:
    random = Random(4)
    moments = [random.choice(undisturbed.phases[phase]) for phase in ("reading", "codec")]
    interrupt_and_complete(nursery, places, undisturbed, moments, delay=None)
