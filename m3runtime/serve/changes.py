"""`work`: the process that changes the bank for a server, which itself only reads it.

One process writes a bank and any number read it, so a server that held it open for writing would keep `m3 sync` out.
This process opens the bank for one change at a time. It has a model of its own, which it loads when there is something
to read, and it is the one that a hostile document takes down.
"""

import os
import signal
import time
import zipfile
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from m3runtime.config.schema import Config
from m3runtime.documents.checking import Check
from m3runtime.documents.readers.opening import readable
from m3runtime.documents.reading import read_file
from m3runtime.documents.sample import Sample
from m3runtime.documents.sources import SourceNames
from m3runtime.documents.survey import Reading
from m3runtime.errors import BankBusyError, InputError, M3Error
from m3runtime.plugins.messages import one_line
from m3runtime.writing.mirror import Mirror

T = TypeVar("T")
OnProgress = Callable[[str, int, int], None]
"""Called with the title of a task, its steps done, and all its steps."""

_PATIENCE = 60.0
"""Seconds that a change waits for another process that writes."""
_PAUSE = 0.2
_UNPACKED = 256 << 20
"""Most bytes of a document that comes as a zip file, such as Word's, when it is unpacked."""


@dataclass(frozen=True, slots=True)
class Add:
    """Remember a file that was uploaded: it takes its name in the folder of uploads, and the bank mirrors it."""

    waiting: Path
    """The file in the folder where uploads wait."""
    target: Path


@dataclass(frozen=True, slots=True)
class Forget:
    """Forget a source, and delete its file if it was uploaded."""

    source: str
    uploads: Path
    erase: bool = False
    """Leave no byte of it in the bank's files."""


@dataclass(frozen=True, slots=True)
class Verify:
    """Read all of the bank and look for damage."""


Change = Add | Forget | Verify


@dataclass(frozen=True, slots=True)
class Progress:
    """Steps of a task that were done, and all of them."""

    title: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a change."""

    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a change that could not be made.

    Of a document, what was committed before a fault stays until it is added again or forgotten.
    """

    message: str
    """One line, without the server's paths."""
    is_input: bool
    """Is the request at fault, not the server?"""


Word = Progress | Done | Failed


def work(config: Config, connection: "Connection[Word, Change]") -> None:
    """Make the changes that come, in order, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the server ends this one
    _step_back()

    def progress(title: str, done: int, total: int) -> None:
        connection.send(Progress(title, done, total))

    with closing(Changes(config)) as changes:
        while True:
            try:
                change = connection.recv()
            except EOFError:  # the server has ended
                return
            try:
                word: Word = Done(changes.make(change, progress))
            except BrokenPipeError:
                return
            except M3Error as error:
                word = Failed(changes.public(str(error)), isinstance(error, InputError))
            except OSError as error:
                word = Failed(changes.public(one_line(error)), is_input=False)
            connection.send(word)


def _step_back() -> None:
    """Let answers come first, and have the system end this process, not the server, if memory runs out."""
    if hasattr(os, "nice"):
        os.nice(5)
    with suppress(OSError):  # elsewhere than on Linux
        Path("/proc/self/oom_score_adj").write_text("500")


def _check_packed(file: Path, name: str) -> None:
    """Raise `InputError` for a zip file that is too large when it is unpacked."""
    if zipfile.is_zipfile(file):
        with readable(file, "zip"), zipfile.ZipFile(file) as packed:
            size = sum(one.file_size for one in packed.infolist())
        if size > _UNPACKED:
            raise InputError(f"{name} is larger than {_UNPACKED >> 20} MiB when it is unpacked; split it")


def _patiently(work: Callable[[], T], progress: OnProgress) -> T:
    """Do some work, and wait for another process that writes. Raises `BankBusyError` if that takes too long."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return work()
        except BankBusyError:
            if time.monotonic() > until:
                raise
            progress("Waiting for another process that writes", 0, 1)
            time.sleep(_PAUSE)


def is_upload(source: str, uploads: Path, names: SourceNames) -> bool:
    """Is a source a file in the folder of uploads itself?"""
    return source.rpartition("/")[0] == names.name(uploads)


class Changes:
    """Makes changes of one bank. For one thread; `close` drops the model."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._mirror = Mirror(config, Reading(config.documents))

    def make(self, change: Change, progress: OnProgress) -> dict[str, Any]:
        """Make one change, and wait for another process that writes. Raises `M3Error`."""
        match change:
            case Add():
                return self._add(change, progress)
            case Forget():
                return _patiently(lambda: self._forget(change), progress)
            case Verify():
                return self._verify(progress)

    def public(self, message: str) -> str:
        """A message without the folders of this machine."""
        base = str(self.config.bank.absolute().parent)
        for folder in (os.path.realpath(base), os.path.normpath(base), base):
            message = message.replace(folder + os.sep, "")
        return message

    def close(self) -> None:
        """Drop model and embedder, if they were loaded."""
        self._mirror.close()

    def _add(self, change: Add, progress: OnProgress) -> dict[str, Any]:
        waiting, target = change.waiting, change.target
        previous = waiting.with_name(f"{waiting.name}.previous")
        progress("Reading the document", 0, 1)
        try:
            self._check(waiting, target.name)
            with suppress(FileNotFoundError):
                target.replace(previous)
            waiting.replace(target)
            try:
                report = _patiently(lambda: self._mirror.write([target], progress), progress)
            except BrokenPipeError:  # the server was killed: the file stays, so that the next sync adds the rest
                raise
            except BaseException:
                target.unlink()
                with suppress(FileNotFoundError):
                    previous.replace(target)
                raise
        finally:
            waiting.unlink(missing_ok=True)
            previous.unlink(missing_ok=True)
        written, (reasons,) = report.written, [*report.survey.unread.values(), ()][:1]
        return {
            "source": self._mirror.names.name(target),
            "references": 0 if written is None else written.references,
            "written": 0 if written is None else written.written,
            "known": report.known if written is None else written.known,
            "forgotten": report.forgotten,
            "unread": [self.public(one) for one in reasons],
        }

    def _check(self, file: Path, name: str) -> None:
        """Raise `InputError` unless a file can be read and has text."""
        _check_packed(file, name)
        check = Check.of(lambda unread: read_file(file, name, unread=unread), Sample())
        if check.is_bad or not check.has_text:
            reason = check.reasons[0] if check.reasons else f"there is no text in {name}"
            raise InputError(reason.replace(str(file), name))

    def _forget(self, change: Forget) -> dict[str, Any]:
        from m3runtime import assembly
        from m3runtime.writing import erasure
        from m3runtime.writing.forgetting import drop_traces
        from m3runtime.writing.moving import Moves

        with closing(assembly.open_bank(self.config)) as bank:
            home, moves = bank.home, Moves(bank.home)
            if change.source not in {*home.sources(), *home.states()}:
                raise InputError(f"the bank remembers nothing from {one_line(change.source)}")
            names = SourceNames(self.config.bank)
            if is_upload(change.source, change.uploads, names):  # first: the next sync would remember a file that stays
                names.path(change.source).unlink(missing_ok=True)
            if change.erase:
                erasure.begin(home)
            moves.forget(change.source)
            moves.make()
            drop_traces(self.config, bank, moves.forgotten)
            erased = erasure.finish_begun(self.config, bank)
        return {
            "source": change.source,
            "forgotten": len(moves.forgotten),
            "erased": None if erased is None else asdict(erased),
        }

    def _verify(self, progress: OnProgress) -> dict[str, Any]:
        from m3runtime.writing.verification import verify

        report = verify(self.config, progress)
        return {
            "clean": report.clean,
            **{name: getattr(report, name) for name in ("blocks", "good", "bad", "quarantined", "cold")},
            "damage": [asdict(one) for one in report.damage],
            "notes": list(report.notes),
        }
