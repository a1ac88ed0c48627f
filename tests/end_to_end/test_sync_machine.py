"""A bank against a dict of files: any sequence of edits, renames, deletions, writes, crashes, forgets and days.

After a write the home, the index and all places are exactly what the files say that have not expired.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.documents.expiry import Expiry
from m3runtime.documents.reference import Place as ReferencePlace
from m3runtime.documents.reference import Reference
from m3runtime.documents.survey import Reading
from m3runtime.runtime import Runtime
from m3runtime.writing.forgetting import forget_expired
from m3runtime.writing.mirror import Mirror, MirrorReport
from m3runtime.writing.writer import Writer
from tests.end_to_end.commands import Place
from tests.end_to_end.conftest import NewPlace
from tests.end_to_end.crashing import Crash, CrashingHome

PARAGRAPHS = [
    f"The {thing} of house {n} is kept dry." for n, thing in enumerate(["lamp", "bell", "rope", "oar", "net"])
]
NAMES = ["a.txt", "b.md", "deep/c.txt", "deep/d.txt", "records.jsonl"]
Content = tuple[str, ...]
"""The paragraphs of a file, or the records of a JSONL file."""
CONTENTS = st.lists(st.sampled_from(PARAGRAPHS), min_size=1, max_size=4).map(tuple)
NAME = st.sampled_from(NAMES)
Held = dict[tuple[str, str], frozenset[tuple[str, int, int, str]]]
"""Maps heading and text to all places."""


class SyncMachine(RuleBasedStateMachine):
    config: ClassVar[Config]
    writer: ClassVar[Writer]

    def __init__(self) -> None:
        super().__init__()
        CrashingHome.left, CrashingHome.after = float("inf"), False
        self.folder = Path(tempfile.mkdtemp(prefix="sync-"))
        self.docs = self.folder / "docs"
        self.files: dict[str, Content] = {}
        self.held: dict[str, Content] | None = {}
        """What the bank has of each file; None after a crash, when that depends on where it was."""
        self.until: dict[str, str] = {}
        """The last day of each file that the bank has, or had until then."""
        self.day = date(2026, 11, 27)
        self.looked = 0
        self.ids: dict[tuple[str, str], tuple[int, bytes]] = {}
        self.settings = self.config.model_copy(update={"bank": self.folder / "bank"})
        self.mirror = self.mirroring()

    @property
    def today(self) -> str:
        return self.day.isoformat()

    def mirroring(self, expiry: Expiry | None = None) -> Mirror:
        return Mirror(self.settings, Reading(expiry=expiry), writer=self.of_this_bank(), today=lambda: self.today)

    def of_this_bank(self) -> Writer:
        return Writer(self.settings, self.writer.adapter, self.writer.embedder, parallel=False)

    def teardown(self) -> None:
        CrashingHome.left = float("inf")
        shutil.rmtree(self.folder)

    # -- the files ----------------------------------------------------------------------------------------------

    @initialize(content=CONTENTS)
    def begin(self, content: Content) -> None:
        """A bank is made of some text."""
        self.put("a.txt", content)
        self.write()

    @rule(name=NAME, content=CONTENTS)
    def put(self, name: str, content: Content) -> None:
        path = self.docs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"text": text, "id": n}) for n, text in enumerate(content))
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else "\n\n".join(content))
        self.files[name] = content

    @rule(name=NAME)
    def blank(self, name: str) -> None:
        self.put(name, ())

    @rule(name=NAME)
    def touch(self, name: str) -> None:
        if name in self.files:
            os.utime(self.docs / name)

    @rule(name=NAME)
    def delete(self, name: str) -> None:
        if name in self.files:
            (self.docs / name).unlink()
            del self.files[name]

    @rule(name=NAME, new=NAME)
    def rename(self, name: str, new: str) -> None:
        if name in self.files and Path(name).suffix == Path(new).suffix != ".jsonl":
            (self.docs / new).parent.mkdir(exist_ok=True)
            (self.docs / name).rename(self.docs / new)
            self.files[new] = self.files.pop(name)

    # -- the bank -----------------------------------------------------------------------------------------------

    @rule()
    def write(self) -> None:
        self.docs.mkdir(exist_ok=True)
        before = dict(self.ids)
        known = self.files if self.held is None else {**self.held, **self.files}
        if not known:
            return
        report = self.mirror.write([self.docs])
        if self.held is not None:
            assert set(report.survey.gone) - set(report.survey.renamed.values()) <= {
                f"docs/{name}" for name in self.held.keys() - self.files.keys()
            }
        self.moved(report)
        self.held = {name: self.left(name, content) for name, content in self.files.items()}
        self.check()
        for key, (id, block) in self.ids.items():
            if key in before:
                assert (id, block) == before[key], "what stays keeps its id and its bytes"
        assert self.mirror.survey([self.docs]).is_in_step if self.files else True

    def moved(self, report: MirrorReport) -> None:
        """Note the last days after a write: a renamed file keeps its own, and a copy has none."""
        survey = report.survey
        for name, origin in survey.renamed.items():
            day = self.until.get(origin.removeprefix("docs/"), "")
            assert origin in survey.gone or not day
            self.until[name.removeprefix("docs/")] = day
        for name in survey.gone:
            self.until.pop(name.removeprefix("docs/"), None)

    def left(self, name: str, content: Content) -> Content:
        """What is remembered of a file: nothing after its last day."""
        return () if self.until.get(name, self.today) < self.today and self.until[name] else content

    @rule(name=NAME, days=st.none() | st.integers(0, 3), never=st.booleans())
    def write_one(self, name: str, days: int | None, never: bool) -> None:
        if name in self.files and self.held is not None and (self.files[name] or name in self.held):
            before = self.until.get(name, "")
            expiry = None
            if days is not None:
                expiry = Expiry() if never else Expiry((self.day + timedelta(days)).isoformat())
                self.until[name] = expiry.day
            self.held = {one: self.left(one, content) for one, content in self.held.items()}
            report = self.mirroring(expiry).write([self.docs / name])
            if expiry is None and name not in self.until:
                self.moved(report)
            assert name in self.until or not before
            self.held[name] = self.left(name, self.files[name])
            self.check()

    @rule(days=st.integers(1, 4))
    def days_pass(self, days: int) -> None:
        self.day += timedelta(days)

    @precondition(lambda self: self.held)
    @rule()
    def forget_expired(self) -> None:
        assert self.held is not None
        self.held = {name: self.left(name, content) for name, content in self.held.items()}
        with closing(assembly.open_bank(self.settings)) as bank:
            forget_expired(self.settings, bank, self.today)
        self.check()

    @rule(left=st.integers(1, 3), after=st.booleans())
    def write_and_crash(self, left: int, after: bool) -> None:
        self.docs.mkdir(exist_ok=True)
        if not self.files and not self.held:
            return
        CrashingHome.left, CrashingHome.after = left, after
        try:
            self.moved(self.mirror.write([self.docs]))
            self.held = {name: self.left(name, content) for name, content in self.files.items()}
        except Crash:
            self.held = None
        finally:
            CrashingHome.left = float("inf")
        if self.held is None:
            with closing(assembly.open_bank(self.settings, read_only=True)) as bank:
                states = bank.home.states()
            after = {name.removeprefix("docs/"): state.expires for name, state in states.items()}
            assert all(after.get(name, day) == day for name, day in self.until.items() if name in self.files)
            self.until = after

    @precondition(lambda self: self.held)
    @rule(name=NAME)
    def forget(self, name: str) -> None:
        assert self.held is not None
        if name in self.held:
            self.m3("forget", f"docs/{name}")
            del self.held[name]
            self.until.pop(name, None)
            self.check()

    @precondition(lambda self: self.held)
    @rule()
    def forget_a_folder(self) -> None:
        assert self.held is not None
        if gone := [name for name in self.held if name.startswith("deep/")]:
            self.m3("forget", "docs/deep")
            for name in gone:
                del self.held[name]
                self.until.pop(name, None)
            self.check()

    def m3(self, *arguments: str) -> None:
        place = Place(self.folder)
        if not place.file.exists():
            place.configure(**self.settings.model_dump(mode="json"))
        assert place.m3(*arguments).code == 0

    # -- what must be true ---------------------------------------------------------------------------------------

    def expected(self) -> Held:
        """What `held` says, by a splitter of its own."""
        held: dict[tuple[str, str], set[tuple[str, int, int, str]]] = {}
        assert self.held is not None
        for name, content in self.held.items():
            texts = enumerate(content) if name.endswith(".jsonl") else [("", "\n\n".join(content))]
            for record, text in texts:
                for one in self.writer.splitter.split(text, f"docs/{name}"):
                    place = (one.source, one.start, one.end, str(record))
                    held.setdefault((one.heading, one.text), set()).add(place)
        return {key: frozenset(places) for key, places in held.items()}

    def check(self) -> None:
        with closing(assembly.open_bank(self.settings, read_only=True)) as bank:
            ids = bank.home.ids()
            references = [one for one in bank.home.references(ids) if one is not None]
            places = {(one.heading, one.text): frozenset(map(_place, one.places)) for one in references}
            assert len(references) == len(ids) == len(places)
            assert places == self.expected()
            assert all(len(set(map(_place, one.places))) == len(one.places) for one in references)
            assert list(bank.home.audit()) == []
            slots = torch.zeros(len(ids), bank.home.slot_bytes, dtype=torch.uint8)
            assert bank.home.read(ids, slots).all()
            self.ids = {
                (one.heading, one.text): (id, slot.numpy().tobytes())
                for id, one, slot in zip(ids.tolist(), references, slots, strict=True)
            }
            index = assembly.bank_index(self.settings, bank).load()  # as the last command left it
            assert index.ids().tolist() == ids.tolist()
            if references:
                vectors = self.writer.embedder.embed_queries([one.text for one in references])
                found, _ = index.search(vectors, 1)
                assert found[:, 0].tolist() == ids.tolist()

    @invariant()
    def nothing_expired_is_recalled(self) -> None:
        """Whatever the home still has: a runtime finds, delivers and cites nothing whose last day has passed."""
        with closing(assembly.open_bank(self.settings, read_only=True)) as bank:
            due = [id for ids in bank.home.expiring(self.today).values() for id in ids.tolist()]
        if due and len(due) != self.looked:
            self.looked = len(due)
            with Runtime.open(self.settings, read_only=True, today=lambda: self.today) as runtime:
                for id, one in zip(due, runtime.references(due), strict=True):
                    assert one is None or all(place.expires in ("", *self.days_ahead(one)) for place in one.places)
                    assert one is not None or id not in runtime.retriever.index.ids()
                parts = runtime.fetch(due, torch.float32)
                assert parts.keys() == {id for id, one in zip(due, runtime.references(due), strict=True) if one}

    def days_ahead(self, reference: Reference) -> list[str]:
        return [place.expires for place in reference.places if place.expires >= self.today]

    @invariant()
    def nothing_is_torn(self) -> None:
        """Whatever was interrupted, records agree, and no text is remembered that no file ever had."""
        with closing(assembly.open_bank(self.settings, read_only=True)) as bank:
            assert list(bank.home.audit()) == []
            assert np.array_equal(bank.home.find([]), [])


def _place(place: ReferencePlace) -> tuple[str, int, int, str]:
    return place.source, place.start, place.end, place.metadata.get("record", "")


@pytest.fixture
def machine(new_place: NewPlace, tmp_path: Path) -> Iterator[type[SyncMachine]]:
    place = new_place(tmp_path)
    place.configure(
        memory={"layers": [0], "reference_tokens": 40},
        codec={"kind": "raw"},
        embedder={"dim": 64},
        tiers=[{"kind": "tests.end_to_end.crashing:CrashingHome", "durability": "relaxed"}],
    )
    config = Config.load(place.file, environ={})
    adapter = assembly.open_adapter(config)
    SyncMachine.config, SyncMachine.writer = config, Writer(config, adapter, assembly.open_embedder(config))
    yield SyncMachine
    adapter.close()


def test_a_bank_mirrors_its_files_whatever_happens(machine: type[SyncMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12, stateful_step_count=14, suppress_health_check=list(HealthCheck), deadline=None
        ),
    )


@pytest.mark.slow
def test_a_bank_mirrors_its_files_through_many_more(machine: type[SyncMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=200, stateful_step_count=30, suppress_health_check=list(HealthCheck), deadline=None
        ),
    )
