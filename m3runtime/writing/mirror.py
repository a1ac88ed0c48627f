"""`Mirror`: keeps a bank in step with files, and loads a model only where there is something to read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from m3runtime.bank.erasures import Erasures
from m3runtime.config.schema import Config
from m3runtime.documents import expiry
from m3runtime.documents.checking import Check
from m3runtime.documents.document import Document
from m3runtime.documents.reading import OnUnread, read_file
from m3runtime.documents.sample import Sample
from m3runtime.documents.sources import SourceNames, SourceState, is_as_stated, state_of
from m3runtime.documents.survey import Reading, Survey, survey
from m3runtime.errors import BankBusyError, BankMissingError, InputError
from m3runtime.memory.spec import fingerprint
from m3runtime.storage.home import Changes, Home
from m3runtime.storage.opening import open_home
from m3runtime.writing import scripts
from m3runtime.writing.moving import Moves

if TYPE_CHECKING:
    from m3runtime.writing.encoders.pool import EncoderPool
    from m3runtime.writing.writer import Writer, WriteReport

OnProgress = Callable[[str, int, int], None]
"""Called with the title of a task, its steps done, and all its steps."""
OnWarning = Callable[[str], None]
"""Called with a line about texts that will hardly be found, before they are written."""

_MOST_REASONS = 100
"""Reasons that the state of a source keeps."""
_WRITTEN = "written"
"""The home's record of the settings of the last write that came to its end, index included; empty during one."""


@dataclass(frozen=True, slots=True)
class MirrorReport:
    """The result of `Mirror.write`."""

    survey: Survey
    written: "WriteReport | None"
    """The report about the files that were read; None if there were none."""
    known: int
    """References of sources that were not read, those of several sources counted in each."""
    forgotten: int
    """References that no source has any more."""
    expired: int = 0
    """References that were forgotten because their last day had passed."""


@dataclass(frozen=True, slots=True)
class _Bank:
    """What a bank has of its sources."""

    exists: bool
    is_whole: bool
    """Did the last write come to its end, with the settings of this one?"""
    sources: Mapping[str, int] = field(default_factory=dict)
    states: Mapping[str, SourceState] = field(default_factory=dict)
    is_erasing: bool = False
    """Did an erasure begin that has not ended?"""
    has_expired: bool = False
    """Is there a place whose last day has passed?"""

    def known(self, found: Survey) -> int:
        """References of sources that are not read, those of several sources counted in each."""
        return sum(self.sources.get(name, 0) for name in (*found.unchanged, *found.renamed.values()))


class Mirror:
    """Writes files and folders into one bank, again and again. One call at a time; `close` drops the model."""

    def __init__(
        self,
        config: Config,
        reading: Reading,
        *,
        keep_missing: bool = False,
        writer: "Writer | None" = None,
        pool: "EncoderPool | None" = None,
        today: Callable[[], str] = expiry.today,
    ) -> None:
        """Without a ``writer`` one is opened when there is something to read, which encodes by ``pool`` if given."""
        self.config = config
        self.reading = reading
        self.keep_missing = keep_missing
        self.today = today
        self.names = SourceNames(config.bank)
        self._opened = ExitStack()
        self._given = writer
        self._pool = pool
        if pool is not None:
            self._opened.callback(pool.close)
        self._settings = fingerprint(
            [getattr(config, name).model_dump(mode="json") for name in ("model", "memory", "codec", "embedder")]
        ).encode()

    def survey(self, paths: Sequence[Path]) -> Survey:
        """The difference between files and bank; changes nothing. Raises what `survey` does, and `BankError`."""
        return self._look(paths)[0]

    def write(
        self, paths: Sequence[Path], progress: OnProgress | None = None, warn: OnWarning | None = None
    ) -> MirrorReport:
        """Bring the bank in step with these files and folders; makes the bank if there is none.

        Whatever has expired is forgotten first, also of other sources.
        Each source changes in one transaction; one of many references takes several, of which the last forgets what
        the source no longer has. References that stay keep ids and bytes. A call can be stopped at any instant, and
        made again.

        A file or a record that cannot be read is left out and named in the report's survey. What the bank has of such a
        file is kept, and the file is looked at again by the next call.

        Raises `InputError` before anything is changed if nothing can be read, and what `Writer.write` does.
        """
        found, bank = self._look(paths)
        expired = self._forget_expired() if bank.has_expired else 0
        if expired:
            found, bank = self._look(paths)
        found, sample = self._readable(paths, found, bank)
        if bank.is_erasing:
            self._finish_erasure()
        if found.is_in_step and bank.is_whole:
            return MirrorReport(found, None, bank.known(found), 0, expired)
        if found.read or not bank.is_whole:
            if warn and (warning := scripts.warning(self._writer.embedder, sample)):
                warn(warning)
            forgotten, report = self._read(found, bank, progress)
        else:
            forgotten, report = self._leave_unread(found, bank), None
        return MirrorReport(found, report, bank.known(found), forgotten, expired)

    def close(self) -> None:
        """Drop model and embedder, if they were loaded. Closing twice is fine."""
        self._opened.close()

    def _look(self, paths: Sequence[Path]) -> tuple[Survey, "_Bank"]:
        bank, today = _Bank(exists=False, is_whole=True), self.today()
        if self._home_folder.exists():
            with suppress(BankMissingError), self._open_home(read_only=True) as home:
                is_whole = home.get_meta(_WRITTEN) == self._settings
                is_erasing = Erasures.of(home).begun
                has_expired = bool(home.expiring(today))
                bank = _Bank(True, is_whole, dict(home.sources()), dict(home.states()), is_erasing, has_expired)
        found = survey(
            paths, self.names, bank.sources, bank.states, self.reading, keep_missing=self.keep_missing, today=today
        )
        return found, bank

    def _readable(self, paths: Sequence[Path], found: Survey, bank: "_Bank") -> tuple[Survey, Sequence[str]]:
        """The survey without files that cannot be read, and with the reasons; and a sample of the texts to be read.

        Raises `InputError` if no file can be read, if there is no text to make a bank of, and if new files are named
        that have none.
        """
        sample = Sample()
        checks = {
            name: Check.of(partial(self._documents_of, found, name, path), sample) for name, path in found.read.items()
        }
        bad = {name for name, check in checks.items() if check.is_bad}
        unread = {**found.unread, **{name: check.reasons for name, check in checks.items() if check.reasons}}
        has_text = any(check.has_text for check in checks.values())
        if unread and not (has_text or checks.keys() - bad or found.unchanged or found.renamed):
            first, *others = chain.from_iterable(unread.values())
            raise InputError(f"{first}; and {len(others)} more could not be read" if others else first)
        known = (*found.changed, *found.renamed, *found.unchanged, *found.gone)
        is_named = not (known or any(path.is_dir() for path in paths))
        if not has_text and (is_named or not bank.exists):
            raise InputError(f"there is no text in {', '.join(map(str, found.read.values()))} that has not expired")
        readable = replace(
            found,
            new={name: path for name, path in found.new.items() if name not in bad},
            changed={name: path for name, path in found.changed.items() if name not in bad},
            states={
                name: replace(state, unread=_reasons(checks[name], found.read[name])) if name in checks else state
                for name, state in found.states.items()
                if name not in bad
            },
            unread=unread,
            left_out={name: check.left_out for name, check in checks.items() if check.left_out},
        )
        return readable, sample.texts

    def _documents(self, found: Survey) -> Iterator[Document]:
        for name, path in found.read.items():
            yield from self._documents_of(found, name, path, (lambda _: None) if name in found.unread else None)

    def _documents_of(self, found: Survey, name: str, path: Path, unread: OnUnread | None) -> Iterator[Document]:
        """The documents of a file with its tags, each with its own last day or the file's, without expired ones."""
        state, today = found.states[name], self.today()
        for document in read_file(path, name, fields=self.reading.fields, unread=unread):
            day = expiry.earlier(document.metadata.get(expiry.EXPIRES, ""), state.expires)
            if not expiry.is_over(day, today):
                own = {**document.metadata, **dict(state.tags)}
                yield replace(document, metadata={**own, expiry.EXPIRES: day} if day else own)

    def _read(self, found: Survey, bank: "_Bank", progress: OnProgress | None) -> "tuple[int, WriteReport]":
        """Write what is new or changed, and all else. Returns the number of forgotten references, too."""
        before = list[int]()

        def states() -> Mapping[str, SourceState | None]:
            """How the files were; none of one that changed while it was read."""
            return {
                **{name: _as_it_stayed(path, found.states[name]) for name, path in found.read.items()},
                **dict.fromkeys([*found.gone, *found.aliases]),
            }

        @contextmanager
        def during(home: Home) -> Iterator[None]:
            if bank.exists:
                self._check_states(home, bank)
                home.set_meta(_WRITTEN, b"")
            if lasting := {name: state.voided() for name in found.read if (state := found.states[name]).has_settings}:
                home.change(Changes(states=lasting))  # an interrupted write must not lose them
            before.extend(self._move(home, found, []))  # what is gone may share texts with what is read
            yield
            home.set_meta(_WRITTEN, self._settings)

        report = self._writer.write(
            self._documents(found),
            states=states,
            during=during,
            whole=self.reading.whole,
            catalogue=self.reading.catalogue,
            progress=progress,
        )
        return len(before) + report.forgotten, report

    def _leave_unread(self, found: Survey, bank: "_Bank") -> int:
        """Rename, forget and state sources without a model. Returns the number of forgotten references."""
        moved = set(found.renamed.values())  # whose references stay
        gone = [name for name in (*found.gone, *found.aliases) if name not in moved]
        with self._open_home() as home:
            self._check_states(home, bank)
            if gone:
                home.set_meta(_WRITTEN, b"")
            forgotten = self._move(home, found, gone)
        if gone:
            from m3runtime import assembly  # loads torch
            from m3runtime.writing.forgetting import drop_traces

            with closing(assembly.open_bank(self.config)) as opened:
                drop_traces(self.config, opened, forgotten)
                opened.home.set_meta(_WRITTEN, self._settings)
        return len(forgotten)

    def _check_states(self, home: Home, bank: "_Bank") -> None:
        """Raise `BankBusyError` if the bank is not as it was when the files were compared with it."""
        if home.states() != bank.states:
            raise BankBusyError(f"another process wrote to {self.config.bank} just now; write again")

    @staticmethod
    def _move(home: Home, found: Survey, gone: Sequence[str]) -> list[int]:
        """Rename and forget sources, and note other times of unchanged ones. Returns the forgotten ids."""
        touched = found.states.keys() - found.read.keys() - found.renamed.keys()
        if not (found.renamed or gone or touched):
            return []
        moves, last = Moves(home), {origin: name for name, origin in found.renamed.items()}
        for name, origin in found.renamed.items():
            moves.copy(origin, name, found.states[name], instead=origin in found.gone and last[origin] == name)
        for name in gone:
            moves.forget(name)
        for name in touched:
            moves.state(name, found.states[name])
        moves.make()
        return moves.forgotten

    def _forget_expired(self) -> int:
        """Forget what has expired. Returns the number of forgotten references."""
        from m3runtime import assembly  # loads torch
        from m3runtime.writing.forgetting import forget_expired

        with closing(assembly.open_bank(self.config)) as bank:
            return len(forget_expired(self.config, bank, self.today()))

    def _finish_erasure(self) -> None:
        """Finish an erasure whose process was killed."""
        from m3runtime import assembly  # loads torch
        from m3runtime.writing.erasure import finish_begun

        with closing(assembly.open_bank(self.config)) as bank:
            finish_begun(self.config, bank)

    @cached_property
    def _writer(self) -> "Writer":
        """The writer with its model and embedder, loaded when there is something to read."""
        if self._given is not None:
            return self._given
        from m3runtime import assembly  # loads torch
        from m3runtime.writing.writer import Writer

        adapter = assembly.open_adapter(self.config)
        self._opened.callback(adapter.close)
        embedder = assembly.open_embedder(self.config)
        self._opened.callback(embedder.close)
        return Writer(self.config, adapter, embedder, pool=self._pool)

    @property
    def _home_folder(self) -> Path:
        return self.config.bank / "home"

    def _open_home(self, *, read_only: bool = False) -> Home:
        return open_home(self.config, read_only=read_only)(path=self._home_folder)


def _reasons(check: Check, path: Path) -> tuple[str, ...]:
    """The first reasons of a check, as the state of a source keeps them."""
    some = [reason.removeprefix(str(path)) for reason in check.reasons[:_MOST_REASONS]]
    more = len(check.reasons) - len(some)
    return (*some, f": {more} more records cannot be read") if more else tuple(some)


def _as_it_stayed(path: Path, state: SourceState) -> SourceState | None:
    """The state of a file that has been read since it was noted; if it changed, None, or its last day and tags."""
    changed = state.voided() if state.has_settings else None
    if state.time:
        return state if is_as_stated(path, state) else changed
    again = state_of(path, state.how)
    return replace(state, time=again.time) if again.digest == state.digest else changed
