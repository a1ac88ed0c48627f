"""Test classes for implementations: the intact one, and those with one mistake each."""

from collections.abc import Iterable
from typing import Any


def make_suites(contract: type, module: str, intact: type, broken: Iterable[type]) -> dict[str, Any]:
    """A subclass of ``contract`` for each implementation, its ``kind``. That of the intact one is ``TestIntact``."""
    names = {"TestIntact": intact} | {f"Test{kind.__name__}": kind for kind in broken}
    return {name: type(name, (contract,), {"kind": kind, "__module__": module}) for name, kind in names.items()}
