"""`survey`: compares files with the sources of a bank, without a model and without reading what did not change."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from m3runtime.config.schema import DocumentsConfig
from m3runtime.documents.expiry import Expiry, is_over
from m3runtime.documents.reading import FIELDS, folder_files
from m3runtime.documents.sources import READING, SourceNames, SourceState, is_as_stated, is_within, state_of
from m3runtime.errors import InputError

_COLD = " catalogue"


@dataclass(frozen=True, slots=True)
class Reading:
    """How files are read and split."""

    fields: DocumentsConfig = FIELDS
    """The fields of JSON lines."""
    whole: bool = False
    catalogue: bool = False
    """Only catalogued: the next write without it encodes them."""
    expiry: Expiry | None = None
    """The expiry of the sources; None: each keeps its last day, and new ones have none."""
    tags: Mapping[str, str] | None = None
    """Added to the metadata of all places of the sources; None: each keeps its tags, and new ones have none."""

    def how(self, suffix: str) -> str:
        """`SourceState.how` of files with this suffix."""
        fields = f" {self.fields.model_dump_json(exclude_defaults=True)}" if suffix.lower() == ".jsonl" else ""
        return f"{READING}{fields}{' whole' * self.whole}{_COLD * self.catalogue}"

    def covers(self, how: str, other: str) -> bool:
        """Is a source that was written in one way as good as one written in the ``other``?"""
        return how in (other, other.removesuffix(_COLD))

    def last_day(self, today: str, known: SourceState | None, *, changed: bool = False) -> str:
        """The last day of a source with this state, if it has any, that is written today."""
        before = known.expires if known else ""
        return before if self.expiry is None else self.expiry.last_day(today, "" if changed else before)

    def tags_of(self, known: SourceState | None) -> tuple[tuple[str, str], ...]:
        """The tags of a source with this state that is written now."""
        before = known.tags if known else ()
        return before if self.tags is None else tuple(sorted(self.tags.items()))

    def keeps(self, known: SourceState, how: str, day: str) -> bool:
        """Was a source with this state written as it would be now, ``how`` and with this last ``day``?"""
        return self.covers(known.how, how) and known.expires == day and known.tags == self.tags_of(known)


@dataclass(frozen=True, slots=True)
class Survey:
    """The difference between files and a bank. Every source that can be read is in one of five groups."""

    new: Mapping[str, Path]
    changed: Mapping[str, Path]
    renamed: Mapping[str, str]
    """Maps a source that the bank lacks to one with the same bytes, whose references it shares or takes over."""
    unchanged: Sequence[str]
    gone: Sequence[str]
    states: Mapping[str, SourceState]
    """How the files are now: of new, changed and renamed sources, and of unchanged ones whose time is another."""
    aliases: Sequence[str]
    """Names that earlier releases gave to sources which are new or changed here."""
    expired: Sequence[str]
    """The unchanged sources whose last day has passed: nothing is remembered of them, whatever the files say now."""
    skipped: Sequence[Path]
    unread: Mapping[str, Sequence[str]]
    """Why sources, or records of them, cannot be read. What is known of a source that cannot be read is kept."""
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What was left out of sources that were read: pictures and files in base64."""

    @property
    def read(self) -> Mapping[str, Path]:
        """The files that must be read."""
        return {**self.new, **self.changed}

    @property
    def is_in_step(self) -> bool:
        """Is there nothing to do?"""
        return not (self.states or self.gone or self.aliases)


def survey(
    paths: Iterable[Path],
    names: SourceNames,
    sources: Mapping[str, int],
    states: Mapping[str, SourceState],
    reading: Reading,
    *,
    keep_missing: bool = False,
    today: str,
) -> Survey:
    """Compare files and folders with the ``sources`` and ``states`` of a bank.

    A source whose last day has passed ``today`` counts as unchanged, whatever its file says, until it gets another day.
    Sources in a folder that are no longer there are gone, unless ``keep_missing``. One that the folder's walk passes
    over, but that exists and was written by its own name, is looked at like the others.

    Raises `InputError` for a path that does not exist, and for a folder in which there is nothing to read and of which
    the bank knows nothing.
    """
    found = _Found(names, sources, states)
    for path in paths:
        found.add(path)
    missing = found.missing()
    gone = [] if keep_missing else missing
    unchanged: list[str] = []
    expired: list[str] = []
    unread = dict[str, Sequence[str]]()
    changed, new, renamed, now = dict[str, Path](), dict[str, Path](), dict[str, str](), dict[str, SourceState]()
    twins: dict[tuple[str, str, str], str] | None = None
    how_of = cache(reading.how)
    for name, file in found.files.items():
        state = states.get(name)
        day = reading.last_day(today, state)
        how = how_of(name[name.rfind(".") :])
        is_known = state is not None and reading.keeps(state, how, day)
        if state is not None and is_over(day, today):
            unchanged.append(name)
            expired.append(name)
            continue
        if state is not None and is_known and is_as_stated(file, state):
            unchanged.append(name)
            if state.unread:
                unread[name] = _reasons(file, state)
            continue
        path = Path(file)
        try:
            seen = state_of(path, how)
        except InputError as error:
            unread[name] = [str(error)]
            continue
        if state is not None and is_known and state.digest == seen.digest:
            unchanged.append(name)
            if state.unread:
                unread[name] = _reasons(file, state)
            if seen.time != state.time:
                now[name] = replace(state, size=seen.size, time=seen.time)
            continue
        is_new = state is None and name not in sources
        twins = _twins(states, gone) if twins is None else twins
        twin = twins.get((seen.digest, seen.how, path.suffix)) if is_new else None
        if twin is not None and _would_have_its_settings(states[twin], reading, today, moved=twin in gone):
            now[name] = replace(states[twin], size=seen.size, time=seen.time)
            renamed[name] = twin
            if now[name].unread:
                unread[name] = _reasons(file, now[name])
            continue
        day, tags = reading.last_day(today, state, changed=True), reading.tags_of(state)
        now[name] = replace(seen, expires=day, tags=tags)
        if is_new:
            new[name] = path
        else:
            changed[name] = path
    return Survey(new, changed, renamed, unchanged, gone, now, found.aliases, expired, found.skipped, unread)


def _would_have_its_settings(twin: SourceState, reading: Reading, today: str, *, moved: bool) -> bool:
    """Would a new source with the bytes of another one have its last day and tags? A ``moved`` one keeps them."""
    known = twin if moved else None
    return (twin.expires, twin.tags) == (reading.last_day(today, known), reading.tags_of(known))


def _reasons(file: str, state: SourceState) -> Sequence[str]:
    """Why records could not be read when the source was."""
    return [f"{Path(file)}{reason}" for reason in state.unread]


def _twins(states: Mapping[str, SourceState], gone: Sequence[str]) -> dict[tuple[str, str, str], str]:
    """Maps digest, settings and suffix to a source with these, and to one that is gone rather than one that stays."""
    order = [*states.items(), *((name, states[name]) for name in gone if name in states)]
    return {(state.digest, state.how, Path(name).suffix): name for name, state in order}


class _Found:
    """The files that were found, by name, and what the bank knows of the places where they were looked for."""

    def __init__(self, names: SourceNames, sources: Mapping[str, int], states: Mapping[str, SourceState]) -> None:
        self.files: dict[str, str] = {}
        self.skipped: list[Path] = []
        self._names = names
        self._known = dict.fromkeys([*sources, *states])
        self._states = states
        self._real = set[str]()
        self._folders: list[str] = []

    def add(self, path: Path) -> None:
        """Take a file, or the files of a folder."""
        name = self._names.name(path)
        if path.is_dir():
            files, skipped = folder_files(path)
            root, above = os.path.join(path, ""), "" if name == "." else f"{name.rstrip('/')}/"  # noqa: PTH118
            found = {above + file[len(root) :].replace(os.sep, "/"): (real, file) for real, file in files.items()}
            found = {one: file for one, file in found.items() if not self._names.is_own(one)}
            self.skipped += [file for file in skipped if not self._names.is_own(self._names.name(file))]
            if not found and not any(is_within(known, name) for known in self._known):
                raise InputError(f"{path} holds no text: no file that ends in .txt, .md, .pdf or another known suffix")
            self._folders.append(name)
        elif path.is_file():
            found = {name: (os.path.realpath(path), str(path))}
        else:
            known = any(is_within(one, name) for one in self._known)
            hint = f"; `m3 forget {path}` forgets what the bank has of it" if known else ""
            raise InputError(f"{path} is neither a file nor a folder{hint}")
        for one, (real, file) in found.items():
            self._take(one, real, file)

    def missing(self) -> list[str]:
        """Sources in the folders that are there no more. Those that still are become `files`."""
        missing = []
        for name in self._known:
            if name in self.files or not any(is_within(name, folder) for folder in self._folders):
                continue
            path = self._names.path(name)
            if path.is_file() and os.path.realpath(path) not in self._real:
                self._take(name, os.path.realpath(path), str(path))
            else:
                missing.append(name)
        return missing

    @property
    def aliases(self) -> list[str]:
        """Sources that earlier releases named otherwise: as they were given, or with the record behind a colon."""
        if not (stateless := [name for name in self._known if name not in self._states]):
            return []
        given = {Path(file).as_posix() for file in self.files.values()} - self.files.keys()
        whole = {name for name in (*self.files, *given) if name.lower().endswith(".jsonl")}
        return [name for name in stateless if name in given or any(name.startswith(f"{one}:") for one in whole)]

    def _take(self, name: str, real: str, file: str) -> None:
        if real not in self._real:
            self._real.add(real)
            self.files[name] = file
