"""`Keys`: who may read and who may write. Keys are kept as digests, and compared in constant time."""

import hmac
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

from m3runtime.config.where import in_sources
from m3runtime.errors import ConfigError
from m3runtime.retrieval.restriction import UNRESTRICTED, Restriction

VARIABLE = "M3_KEYS"
_ENTRY = re.compile(
    r"""(?:(read|write)[\s:]++|(?!(?:read|write)[\s:]))"""  # `read:` and a key that is too short are no key together
    r"""([\x21-\x7e]{8,512})((?:\s+(?:"[^"]+"|[^\s"]\S*))*)"""
)
_NAME = re.compile(r'"([^"]+)"|(\S+)')


@dataclass(frozen=True, slots=True)
class Grant:
    """The access of a request, and the memories that it may read."""

    access: Literal["none", "read", "write"]
    restriction: Restriction = UNRESTRICTED
    """The memories that it may read."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Digests of keys. A write key may read as well. Without any key everything is allowed."""

    grants: tuple[tuple[bytes, Grant], ...] = field(default=(), repr=False)
    """The digest of each key, and what it allows."""

    @property
    def needed(self) -> bool:
        """Does a request need a key?"""
        return bool(self.grants)

    def grant(self, key: str) -> Grant | None:
        """The grant of a key, or None for an unknown one."""
        digest = _digest(key)
        # All are compared, whichever fits: the time tells nothing.
        found = [grant for one, grant in self.grants if hmac.compare_digest(digest, one)]
        return found[0] if found else None

    @classmethod
    def load(cls, file: Path | None, environ: Mapping[str, str] | None = None) -> "Keys":
        """The keys of ``serve.keys_file`` and of the variable ``M3_KEYS``, separated there by commas.

        An entry is ``read KEY`` (``read:KEY``), ``write KEY``, or ``KEY`` for both. A key has 8 to 512 visible ASCII
        characters. Names of sources and folders after a key to read restrict it to these: ``read KEY docs/ faq.md``;
        names with spaces stand between double quotes.
        Raises `ConfigError`, which names the place of a bad entry and never the entry.
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
        grants = dict[bytes, Grant]()
        for where, text in entries:
            entry = text.strip()
            if not entry or entry.startswith("#"):
                continue
            found = _ENTRY.fullmatch(entry)
            if found is None or (found[3] and found[1] != "read") or _digest(found[2]) in grants:
                raise ConfigError(
                    f"{where} is no key: write `read KEY` or `write KEY`, of 8 or more visible characters"
                )
            names = frozenset(quoted or plain for quoted, plain in _NAME.findall(found[3] or ""))
            restriction = Restriction(where=in_sources(names)) if names else UNRESTRICTED
            grants[_digest(found[2])] = Grant("read" if found[1] == "read" else "write", restriction)
        return cls(tuple(grants.items()))


def _digest(key: str) -> bytes:
    return sha256(key.encode(errors="surrogateescape")).digest()
