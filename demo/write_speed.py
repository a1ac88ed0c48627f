"""Compare writing by one process, by processes and by actors of Ray: ``python demo/write_speed.py [REFERENCES]``.

All have one thread for each core, and one process is tried with a single one, too. The start is the time until every
encoder has delivered a group, and the rate is that of the references that follow, in seconds of the wall and of CPU of
all processes. The model is SmolLM2-135M in float32, and references have about 30 tokens. Run it on a machine without
other work: threads that wait for each other spin, and with other work that takes most of their time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import models
from m3runtime import assembly
from m3runtime.cli.write import pool_of
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.writing.encoding import GROUP
from m3runtime.writing.writer import Writer

ROOT = Path(__file__).parent.parent
COUNT = 768
CORES = len(os.sched_getaffinity(0))
WAYS: dict[str, tuple[int, int | None, str | None]] = {
    "one process": (CORES, None, None),
    "one thread": (1, None, None),
    "processes": (CORES, CORES, None),
    "Ray": (CORES, CORES, "local"),
}
"""Threads, encoders, and the address of a cluster."""
TICK = os.sysconf("SC_CLK_TCK")


def text(number: int) -> str:
    """A reference of about 30 tokens that no other is like."""
    return (
        f"Keeper {number} lit the lamp of the harbour on day {number * 37 % 1000}, wrote {number * 91 % 1709} words "
        f"into the log, and rowed {number * 17 % 83} passengers across."
    )


def write(way: str, count: int) -> None:
    """Write a bank in one way, and print the wall, the CPU seconds and the number of references at each group."""
    began, (_, workers, ray) = time.perf_counter(), WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        config = Config.model_validate(
            {
                "bank": f"{folder}/bank",
                "model": {"path": str(models.smollm2(ROOT / ".cache/models"))},
                "embedder": {"path": str(models.minilm())},
                "codec": {"kind": "scalar"},
            }
        )
        seen: list[tuple[float, float, int]] = []

        def progress(title: str, done: int, total: int) -> None:  # noqa: ARG001
            if done // GROUP > (seen[-1][2] // GROUP if seen else 0):
                seen.append((time.perf_counter() - began, cpu_seconds(), done))

        adapter = assembly.open_adapter(config)
        writer = Writer(config, adapter, assembly.open_embedder(config), pool=pool_of(workers, ray))
        writer.write([Document(f"{n}.txt", text(n)) for n in range(count)], progress=progress)
        seen.append((time.perf_counter() - began, cpu_seconds(), count))
    print(json.dumps(seen))


def cpu_seconds() -> float:
    """CPU seconds of this process and of all that it started."""
    parents, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)], used[int(stat.parent.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    ours, more = {os.getpid()}, True
    while more:
        more = {one for one, parent in parents.items() if parent in ours} - ours
        ours |= more
    return sum(used.get(one, 0) for one in ours) / TICK


def main(count: int) -> None:
    """Run all ways, one after the other, and print a line for each."""
    for way, (threads, workers, _) in WAYS.items():
        command, variables = (
            [sys.executable, __file__, way, str(count)],
            {**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
        seen = json.loads(done.stdout.splitlines()[-1])
        first = seen[(workers or 1) - 1]
        last = [one for one in seen[:-1] if one[2] > first[2]][-1]
        wall, cpu, references = (b - a for a, b in zip(first, last, strict=True))
        print(
            f"{way}: start {first[0]:.1f} s ({first[1]:.1f} of CPU, {first[2]} references); then "
            f"{references / wall:.2f} references/s, {references / cpu:.2f} for each second of CPU; all in "
            f"{seen[-1][0]:.1f} s ({max(cpu for _, cpu, _ in seen):.1f} of CPU)",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        write(sys.argv[1], int(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else COUNT)
