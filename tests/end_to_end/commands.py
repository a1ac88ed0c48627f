"""Runs ``m3``, in this process and as one of its own, and looks into the banks that it leaves."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from m3runtime import assembly, cli
from m3runtime.config.schema import Config
from m3runtime.config.yaml_file import parse_yaml
from m3runtime.documents.reference import Reference
from m3runtime.memory import block
from tests.yaml_text import dumped

REPOSITORY = Path(__file__).parents[2]
M3 = Path(sysconfig.get_path("scripts"), "m3")
FACTS = {
    "lamp.txt": "The harbour lamp of Uskerfold burns walnut oil, and a keeper trims it at dusk.\n",
    "ferry.md": "# The ferry\n\nThe ferry to Brannoch sails on every day but Tuesday; the crossing takes 55 minutes.\n",
    "bread.rst": "Bread\n=====\n\nCaraway and pumpkin go into the flat loaves that bakers sell at Michaelmas.\n",
    "wall.html": "<html><h1>Wall</h1><p>Quarrymen built the northern wall in 1431 from granite.</p></html>",
    "birds.jsonl": '{"text": "Seventeen herons nest behind the abbey.", "id": "herons"}\n'
    '{"text": "An owl named Perpetua guards the library.", "id": "owl"}\n',
}
"""A small corpus: files of every kind, and one thing to ask each of them."""


def records(texts: Iterable[str]) -> str:
    """JSON lines of which each has one of these texts: a reference each, however short."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as the one line of JSON that it must be."""
        assert self.code == 0, self.err
        (line,) = self.out.splitlines()
        return json.loads(line)

    @property
    def complaint(self) -> str:
        """The one line that a mistake of the user ends in."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("m3: ")
        return line


def environment(first: str = "") -> dict[str, str]:
    """Variables for a process that can import what the tests can, and before it what the folder ``first`` has."""
    packages = [REPOSITORY, REPOSITORY / "backends", REPOSITORY / "model"]
    path = os.pathsep.join([*filter(None, [first]), *map(str, packages)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # the cores are busy with other tests


@dataclass(frozen=True)
class Place:
    """A folder with a configuration, in which commands run."""

    folder: Path

    @property
    def bank(self) -> Path:
        return self.folder / "bank"

    @property
    def file(self) -> Path:
        return self.folder / "m3.yaml"

    def configure(self, **changes: Any) -> None:
        """Change sections of the configuration, key by key; None takes a section away."""
        settings = parse_yaml(self.file.read_text(), "m3.yaml") if self.file.exists() else {}
        for name, value in changes.items():
            section = settings.get(name)
            settings[name] = {**section, **value} if isinstance(section, dict) and isinstance(value, dict) else value
        self.file.write_text(dumped({name: value for name, value in settings.items() if value is not None}))

    def text(self, name: str, content: str | bytes) -> str:
        """Make a file. Returns its name."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def facts(self) -> str:
        """Make the folder of `FACTS`. Returns its name."""
        for name, content in FACTS.items():
            self.text(f"facts/{name}", content)
        return "facts"

    def m3(self, *arguments: object, stdin: str | bytes = "", **variables: str) -> Result:
        """Run a command in this process: as ``m3`` does, but without importing everything anew."""
        given = stdin if isinstance(stdin, bytes) else stdin.encode()
        out, err = (TextIOWrapper(BytesIO(), "utf-8", write_through=True) for _ in range(2))
        # The command's surroundings, not its parts: arguments, input, environment and working directory.
        with (
            patch.object(sys, "argv", ["m3", *map(str, arguments)]),
            patch.object(sys, "stdin", TextIOWrapper(BytesIO(given), "utf-8")),
            patch.dict(os.environ, variables),
            chdir(self.folder),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            try:
                cli.main()
                code: Any = 0
            except SystemExit as exit:
                code = exit.code
        assert isinstance(out.buffer, BytesIO)
        assert isinstance(err.buffer, BytesIO)
        return Result(int(code or 0), out.buffer.getvalue().decode(), err.buffer.getvalue().decode())

    def process(self, *arguments: object, first: str = "") -> Result:
        """Run a command as a process; see `environment`."""
        done = subprocess.run(
            [M3, *map(str, arguments)],
            cwd=self.folder,
            env=environment(first),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def contents(self) -> "Contents":
        """All that the bank holds, every block checked."""
        return contents(self.file)


@dataclass(frozen=True)
class Contents:
    """All that a bank holds, by id."""

    blocks: dict[int, bytes]
    references: dict[int, Reference]
    embeddings: dict[int, bytes]
    next_id: int
    manifest: bytes

    @property
    def texts(self) -> dict[int, str]:
        return {id: reference.text for id, reference in self.references.items()}


def contents(file: Path) -> Contents:
    """What the bank of a configuration holds; no id lacks a part, and every block is what it should be."""
    bank = assembly.open_bank(Config.load(file, environ={}), read_only=True)
    try:
        ids = bank.home.ids()
        slots = torch.zeros(len(ids), bank.home.slot_bytes, dtype=torch.uint8)
        assert bank.home.read(ids, slots).all()
        assert len(bank.home) == len(ids)
        blocks, references = {}, {}
        for id, slot, reference in zip(ids.tolist(), slots.numpy(), bank.home.references(ids), strict=True):
            blocks[id] = slot[: block.check(slot, id=id, stamp=bank.codecs)].tobytes()
            assert reference is not None
            references[id] = reference
        headings = [one.heading for one in references.values()]
        assert bank.home.find([one.text for one in references.values()], headings) == ids.tolist()
        assert dict(bank.home.sources()) == Counter(name for one in references.values() for name in one.sources)
        vectors = {}
        for some, rows in bank.home.embeddings():
            assert np.isfinite(rows).all()
            vectors.update(zip(some.tolist(), (row.tobytes() for row in rows), strict=True))
        assert list(vectors) == ids.tolist()
        return Contents(blocks, references, vectors, bank.home.next_id(), bank.manifest.to_bytes())
    finally:
        bank.close()


def of_line(text: str, pattern: str) -> str:
    """The part of a text that a pattern's first group matches."""
    found = re.search(pattern, text)
    assert found, text
    return found[1]
