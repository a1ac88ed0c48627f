"""`Mirror`: keeps a bank in step with files, and loads a model only where there is something to read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from m3runtime.config.schema import Config
from m3runtime.documents.reading import Document, read_file
from m3runtime.documents.sources import SourceNames, SourceState, is_as_stated, state_of
from m3runtime.documents.survey import Reading, Survey, survey
from m3runtime.errors import BankBusyError, BankMissingError, InputError
from m3runtime.memory.spec import fingerprint
from m3runtime.storage.home import Home
from m3runtime.storage.opening import open_home
from m3runtime.writing.moving import Moves

if TYPE_CHECKING:
    from m3runtime.writing.writer import Writer, WriteReport

OnProgress = Callable[[str, int, int], None]
"""Called with the title of a stage, its steps done, and all its steps."""

_SETTINGS = "settings"
"""The home's record of the settings that a bank was last written with."""


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


class Mirror:
    """Writes files and folders into one bank, again and again. One call at a time; `close` drops the model."""

    def __init__(
        self, config: Config, reading: Reading, *, keep_missing: bool = False, writer: "Writer | None" = None
    ) -> None:
        """Without a ``writer`` one is opened when there is something to read."""
        self.config = config
        self.reading = reading
        self.keep_missing = keep_missing
        self.names = SourceNames(config.bank)
        self._opened = ExitStack()
        self._given = writer
        self._settings = fingerprint(
            [getattr(config, name).model_dump(mode="json") for name in ("model", "memory", "codec", "embedder")]
        ).encode()

    def survey(self, paths: Sequence[Path]) -> Survey:
        """The difference between files and bank; changes nothing. Raises what `survey` does, and `BankError`."""
        return self._look(paths)[0]

    def write(self, paths: Sequence[Path], progress: OnProgress | None = None) -> MirrorReport:
        """Bring the bank in step with these files and folders; makes the bank if there is none.

        Each source changes in one transaction; one of many references takes several, of which the last forgets what
        the source no longer has. References that stay keep ids and bytes. A call can be stopped at any instant, and
        made again.

        Raises `InputError` before anything is changed, and what `Writer.write` does.
        """
        found, sources, states, fits = self._look(paths)
        if found.read and not sources:
            self._check_text(found)
        forgotten, report = list[int](), None
        alone = [] if found.read else [*found.gone, *found.aliases]  # otherwise what they share is kept by the writer
        touched = found.states.keys() - found.read.keys() - found.renamed.keys()
        if found.renamed or alone or touched:
            forgotten = self._move(found, alone, touched, states)
        if found.read or not fits:
            report = self._read(found, progress)
            if not (fits and sources):
                with self._open_home() as home:
                    home.set_meta(_SETTINGS, self._settings)
        elif forgotten:
            self._drop_traces(forgotten)
        unread = [*found.unchanged, *found.renamed.values()]
        known = sum(sources.get(name, 0) for name in unread)
        return MirrorReport(found, report, known, len(forgotten) + (report.forgotten if report else 0))

    def close(self) -> None:
        """Drop model and embedder, if they were loaded. Closing twice is fine."""
        self._opened.close()

    def _look(self, paths: Sequence[Path]) -> tuple[Survey, Mapping[str, int], Mapping[str, SourceState], bool]:
        """The survey, the bank's sources and states, and whether it was last written with the same settings."""
        sources, states, fits = dict[str, int](), dict[str, SourceState](), True
        if self._home_folder.exists():
            with suppress(BankMissingError), self._open_home(read_only=True) as home:
                sources, states = dict(home.sources()), dict(home.states())
                fits = home.get_meta(_SETTINGS) == self._settings
        found = survey(paths, self.names, sources, states, self.reading, keep_missing=self.keep_missing)
        return found, sources, states, fits

    def _check_text(self, found: Survey) -> None:
        """Raise `InputError` if there is no text to make a bank of."""
        if not any(True for _ in self._documents(found)):
            raise InputError(f"there is no text in {', '.join(map(str, found.read.values()))}")

    def _documents(self, found: Survey) -> Iterator[Document]:
        for name, path in found.read.items():
            yield from read_file(path, name, text_field=self.reading.text_field)

    def _move(
        self, found: Survey, gone: Sequence[str], touched: "set[str]", states: Mapping[str, SourceState]
    ) -> list[int]:
        """Rename and forget sources without reading any. Returns the forgotten ids."""
        with self._open_home() as home:
            if home.states() != states:
                raise BankBusyError(f"another process wrote to {self.config.bank} just now; write again")
            moves = Moves(home)
            left = set(gone) | set(found.gone)
            last = {origin: name for name, origin in found.renamed.items()}
            for name, origin in found.renamed.items():
                moves.copy(origin, name, found.states[name], instead=origin in left and last[origin] == name)
            for name in gone:
                if name not in last:
                    moves.forget(name)
            for name in touched:
                moves.state(name, found.states[name])
            moves.make()
            return moves.forgotten

    def _read(self, found: Survey, progress: OnProgress | None) -> "WriteReport":
        """Write what is new or changed."""
        for document in self._documents(found):
            for _ in document.blocks():
                pass  # a file that cannot be read shows before a model is loaded

        def states() -> Mapping[str, SourceState | None]:
            """How the files were; none of one that changed while it was read."""
            read = {name: found.states[name] for name in found.read}
            return {
                **{name: _as_it_stayed(found.read[name], state) for name, state in read.items()},
                **dict.fromkeys([*found.gone, *found.aliases]),
            }

        return self._writer.write(
            self._documents(found),
            states=states,
            whole=self.reading.whole,
            catalogue=self.reading.catalogue,
            progress=progress,
        )

    def _drop_traces(self, ids: Sequence[int]) -> None:
        """Drop forgotten references from the index and from tiers that outlive the process."""
        from m3runtime import assembly  # loads torch
        from m3runtime.writing.forgetting import drop_traces

        with closing(assembly.open_bank(self.config)) as bank:
            drop_traces(self.config, bank, ids)

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
        return Writer(self.config, adapter, embedder)

    @property
    def _home_folder(self) -> Path:
        return self.config.bank / "home"

    def _open_home(self, *, read_only: bool = False) -> Home:
        return open_home(self.config, read_only=read_only)(path=self._home_folder)


def _as_it_stayed(path: Path, state: SourceState) -> SourceState | None:
    """The state of a file that has been read since it was noted; None if the file changed."""
    if state.time:
        return state if is_as_stated(path, state) else None
    again = state_of(path, state.how)
    return again if again.digest == state.digest else None
