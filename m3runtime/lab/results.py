"""`Result`: figures of one run with the software and the machine, as JSON; `Spread`: figures of several rounds."""

import os
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult

PACKAGES = (
    "m3runtime",
    "torch",
    "transformers",
    "sentence-transformers",
    "usearch",
    "faiss-cpu",
    "numpy",
    "numba",
    "triton",
    "zstandard",
)


@dataclass(frozen=True, slots=True)
class Spread:
    """The median and the quartiles of one figure over several rounds; seconds, unless stated otherwise."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    rounds: int

    @classmethod
    def of(cls, figures: Sequence[float]) -> "Spread":
        """The spread of at least one figure."""
        low, median, high = np.quantile(figures, [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high), len(figures))

    @classmethod
    def ratio(cls, figures: Sequence[float], baseline: Sequence[float]) -> "Spread":
        """The spread of the ratios of two figures of the same rounds."""
        return cls.of([figure / base for figure, base in zip(figures, baseline, strict=True)])

    def __str__(self) -> str:
        return f"{1e3 * self.median:.2f} ms ({1e3 * self.low:.2f} to {1e3 * self.high:.2f})"

    def show_ms(self) -> str:
        """Median and quartiles of seconds as milliseconds, without the unit."""
        return f"{1e3 * self.median:.2f} ({1e3 * self.low:.2f} to {1e3 * self.high:.2f})"

    def show(self, digits: int) -> str:
        """Median and quartiles with ``digits`` decimal places, without a unit."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


class Result(ABC):
    """Base class for the dataclass that a bench returns. A console of rich prints it as tables."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """All figures, with software and machine, as JSON values."""
        return {**plain(self), "environment": environment()}

    @abstractmethod
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The figures for people: tables and lines of text."""


def environment() -> dict[str, str]:
    """Versions of the software, and the machine."""
    import torch

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["machine"] = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    found["system"] = f"{platform.system()} {platform.machine()}"
    return found


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def plain(value: Any) -> Any:
    """Dataclasses, mappings, sequences and paths as JSON values; infinities as text, which JSON does not have."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    return str(value) if isinstance(value, Path) else value
