"""The cost of a connector that nothing uses in vLLM: the bound in docs/vllm.md.

Run it in the environment of `make test-vllm`:

    OMP_NUM_THREADS=1 .venv-vllm/bin/python demo/vllm_unused.py m3.yaml

It measures in two ways, each in turns ABBA on one core, so that a loaded machine does little harm:

- *steps*: one engine with the connector, which is taken out and put back between two steps. The rest is equal, so the
  ratio is what the connector does, and it is the bound.
- *processes*: engines with the connector and without, each in its own process, and a second one without. This has what
  loading the connector changes, too. How much two processes without it differ tells how much of that is noise.

Four turns give a ratio of CPU seconds, those of all threads. The median is printed with its 95 % interval by bootstrap.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_cost import opened

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PROMPT = [1, *range(2000, 2023)]  # shorter than a block, so that no request finds it in the prefix cache
TOKENS = 8
"""The length of an answer, where processes take turns."""

Seconds = Mapping[str, float]
"""CPU seconds by what was done."""


@contextmanager
def without_connector(llm: Any) -> Iterator[None]:
    """An engine as if it had been opened without."""
    from vllm.distributed.kv_transfer import kv_transfer_state

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    kept = scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT
    scheduler.connector = kv_transfer_state._KV_CONNECTOR_AGENT = None
    try:
        yield
    finally:
        scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT = kept


def begin(llm: Any, batch: int, tokens: int) -> float:
    """Queue requests and write their first tokens; returns its CPU seconds."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    began = time.process_time()
    for number in range(batch):
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": [*PROMPT, 100 + number]}, params)
    llm.llm_engine.step()
    return time.process_time() - began


def step(llm: Any) -> float:
    """The next token of all requests under way; returns its CPU seconds."""
    began = time.process_time()
    llm.llm_engine.step()
    return time.process_time() - began


def in_turns(llm: Any, count: int, run: Callable[[], float]) -> list[float]:
    """Ratios of with and without the connector, of four runs each."""
    ratios = []
    for _ in range(count):
        first = run()
        with without_connector(llm):
            without = run() + run()
        ratios.append((first + run()) / without)
    return ratios


def by_steps(llm: Any, batch: int, count: int) -> dict[str, list[float]]:
    """Ratios of a connector that is taken out and put back."""
    for _ in range(3):
        begin(llm, batch, 1)  # warms up
    first = in_turns(llm, count // 2, lambda: begin(llm, batch, 1))
    begin(llm, batch, 2 + 4 * count)
    step(llm)
    rest = in_turns(llm, count, lambda: step(llm))
    return {f"first token, batch {batch}": first, f"decoding, batch {batch}": rest}


def take_turn(llm: Any, batch: int) -> Seconds:
    """Answer so many requests."""
    first = begin(llm, batch, 1 + TOKENS)
    rest = sum(step(llm) for _ in range(TOKENS))
    return {f"first token, batch {batch}": first, f"decoding, batch {batch}": rest}


def work(config: str, connector: bool, core: int, pipe: "Connection") -> None:
    """Do what is asked for: a turn of a batch, or so many ratios by steps."""
    os.sched_setaffinity(0, {core})
    llm = opened(config, connector)
    pipe.send(None)
    while (asked := pipe.recv()) is not None:
        batch, count = asked
        pipe.send(by_steps(llm, batch, count) if count else take_turn(llm, batch))


class Engines:
    """Processes by name, each with an engine."""

    def __init__(self, config: str, core: int) -> None:
        self._config, self._core = config, core
        self._pipes: dict[str, Connection] = {}

    def start(self, name: str) -> None:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        args = (self._config, name == "connector", self._core, theirs)
        multiprocessing.get_context("spawn").Process(target=work, args=args, daemon=True).start()
        ours.recv()
        self._pipes[name] = ours

    def ask(self, name: str, batch: int, count: int = 0) -> Any:
        self._pipes[name].send((batch, count))
        return self._pipes[name].recv()

    def by_processes(self, rounds: int, batch: int) -> list[dict[str, Seconds]]:
        """The seconds of each engine in its two turns of a round."""
        names = [*self._pipes]
        found = []
        for number in range(rounds + 1):
            order = [*names[number % 3 :], *names[: number % 3]]
            turns = [(name, self.ask(name, batch)) for name in [*order, *reversed(order)]]
            if number:  # the first one warms up
                found.append({name: _sum(took for other, took in turns if other == name) for name in names})
        return found


def _sum(turns: Iterator[Seconds]) -> Seconds:
    one, other = turns
    return {what: one[what] + other[what] for what in one}


def tell(way: str, what: str, ratios: list[float]) -> None:
    """Print the median of ratios, less one, in per cent."""
    choices = np.random.default_rng(0).choice(np.array(ratios), (5000, len(ratios)))
    lost = [np.median(ratios), *np.quantile(np.median(choices, axis=1), [0.025, 0.975])]
    median, low, high = (round(100 * (float(one) - 1), 2) for one in lost)
    line = {"way": way, "what": what, "ratios": len(ratios), "lost_percent": median, "interval": [low, high]}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="requests at once")
    parser.add_argument("--steps", type=int, default=100, help="ratios by steps; 0: none")
    parser.add_argument("--rounds", type=int, default=30, help="ratios by processes; 0: none")
    parser.add_argument("--plain-first", action="store_true", help="start the processes in the other order")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    given = parser.parse_args()
    engines = Engines(str(given.config.resolve()), given.core)
    if given.plain_first:
        engines.start("plain")
    engines.start("connector")
    if given.steps:
        for batch in given.batch:
            for what, ratios in engines.ask("connector", batch, given.steps).items():
                tell("steps", what, ratios)
    if given.rounds:
        for name in ("plain", "plain again")[given.plain_first :]:
            engines.start(name)
        for batch in given.batch:
            found = engines.by_processes(given.rounds, batch)
            for what in found[0]["plain"]:
                for name in ("connector", "plain again"):
                    ratios = [one[name][what] / one["plain"][what] for one in found]
                    tell(f"{name} : plain", what, ratios)
