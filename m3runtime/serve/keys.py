"""`Keys`: who may read and who may write. Keys are kept as digests, and compared in constant time."""

import hmac
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

from m3runtime.errors import ConfigError

Access = Literal["read", "write"]

VARIABLE = "M3_KEYS"
_ENTRY = re.compile(r"(?:(read|write)[\s:]+)?([\x21-\x7e]{8,512})")


@dataclass(frozen=True, slots=True)
class Keys:
    """Digests of keys. A write key may read as well. Without any key everything is allowed."""

    reading: tuple[bytes, ...] = field(default=(), repr=False)
    writing: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def needed(self) -> bool:
        """Does a request need a key?"""
        return bool(self.reading or self.writing)

    def access(self, key: str) -> Access | None:
        """What a key allows, or None for an unknown one."""
        digest = _digest(key)
        # All are compared, whichever fits: the time tells nothing.
        reads = [hmac.compare_digest(digest, one) for one in self.reading]
        writes = [hmac.compare_digest(digest, one) for one in self.writing]
        return "write" if any(writes) else "read" if any(reads) else None

    @classmethod
    def load(cls, file: Path | None, environ: Mapping[str, str] | None = None) -> "Keys":
        """The keys of ``serve.keys_file`` and of the variable ``M3_KEYS``, separated there by commas.

        An entry is ``read KEY`` (``read:KEY``), ``write KEY``, or ``KEY`` for both. A key has 8 to 512 visible ASCII
        characters. Raises `ConfigError`, which names the place of a bad entry and never the entry.
        """
        entries = list[tuple[str, str]]()
        if file is not None:
            try:
                lines = file.read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"serve.keys_file: cannot read {file}: {type(error).__name__}") from None
            entries += [(f"{file}: line {number}", line) for number, line in enumerate(lines, 1)]
        given = (os.environ if environ is None else environ).get(VARIABLE, "")
        entries += [(f"{VARIABLE}: entry {number}", one) for number, one in enumerate(given.split(","), 1)]
        keys = cls._of(entries)
        if file is not None and not keys.needed:
            raise ConfigError(f"serve.keys_file: {file} has no key")
        return keys

    @classmethod
    def _of(cls, entries: Iterable[tuple[str, str]]) -> "Keys":
        reading, writing = list[bytes](), list[bytes]()
        for where, text in entries:
            entry = text.strip()
            if not entry or entry.startswith("#"):
                continue
            found = _ENTRY.fullmatch(entry)
            if found is None:
                raise ConfigError(
                    f"{where} is no key: write `read KEY` or `write KEY`, of 8 or more visible characters"
                )
            (reading if found[1] == "read" else writing).append(_digest(found[2]))
        return cls(tuple(reading), tuple(writing))


def _digest(key: str) -> bytes:
    return sha256(key.encode(errors="surrogateescape")).digest()
