"""`Journal`: the records of an evaluation in a file, so that a stopped run can resume."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from m3runtime.errors import InputError
from m3runtime.memory.spec import canonical_json

T = TypeVar("T")


def silent(title: str, done: int, total: int) -> None:
    """Report progress to nobody."""


class Journal:
    """Records by key, one line of JSON each. One thread, one process.

    Records survive a crash once `add` has returned. An incomplete last line is dropped.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        """``fingerprint`` identifies what the records depend on. Raises `InputError` if the file has another one."""
        self.path = path
        self.done: dict[str, Any] = {}
        whole = self._read(fingerprint) if path.exists() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if whole else "wb")
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._write([{"fingerprint": fingerprint}])

    def add(self, records: Mapping[str, Any]) -> None:
        """Append records of JSON values. Each key may be added once."""
        self._write([{"key": key, "value": value} for key, value in records.items()])
        # The same values as a later run reads: tuples as lists, keys as text.
        self.done.update(json.loads(json.dumps(dict(records))))

    def fill(
        self,
        tasks: Sequence[T],
        size: int,
        key: Callable[[T], str],
        compute: Callable[[Sequence[T]], Sequence[Any]],
        progress: Callable[[int, int], None],
    ) -> None:
        """Compute the records of the tasks that have none, ``size`` tasks in a call of ``compute``.

        Equal tasks in equal order are always batched alike, also if some are done: in another batch, rounding would
        give other records. ``progress`` is called with the number of tasks that are done, and of all.
        """
        for start in range(0, len(tasks), size):
            batch = tasks[start : start + size]
            missing = {key(task) for task in batch} - self.done.keys()
            if missing:
                progress(start, len(tasks))
                records = zip(batch, compute(batch), strict=True)
                self.add({key(task): record for task, record in records if key(task) in missing})
        progress(len(tasks), len(tasks))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._file.write("".join(canonical_json(line) + "\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, fingerprint: str) -> int:
        """Read all complete lines; returns their length in bytes."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        try:
            lines = [json.loads(line) for line in content[:whole].splitlines()]
            theirs = lines[0]["fingerprint"] if lines else fingerprint
            self.done = {line["key"]: line["value"] for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} is not the journal of an evaluation; move it away") from error
        if theirs != fingerprint:
            raise InputError(
                f"{self.path}: an evaluation of other settings, questions or software was begun here; "
                "choose another --out, or remove this file"
            )
        return whole
