"""The cost of memories inside vLLM, against the same references as text: the figures of docs/vllm.md.

Run it in the environment of `make test-vllm`, with nothing else on the machine:

    OMP_NUM_THREADS=1 .venv-vllm/bin/python demo/vllm_cost.py m3.yaml

With ``--unused 20`` it only compares a connector that nothing uses with none: two engines, each in its own process,
answer the same 20 times, in turns, and the ratio of their CPU seconds is given with its 95 % interval. A loaded machine
does that no harm.
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

QUESTION = "\n\nQuestion: Tell me all that you know of {}.\nAnswer:"
TOPICS = ("the harbour lamp", "the market hall", "bees", "the gate", "the bell", "the ferry", "the wall", "an owl")
TOKENS = 60
OPTIONS = {"dtype": "float32", "max_model_len": 2048, "block_size": 32, "enforce_eager": True, "max_num_seqs": 16}


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def timed(llm: Any, requests: list[tuple[list[int], dict[str, Any] | None]], tokens: int) -> float:
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": wish} if wish else None,
        )
        for _, wish in requests
    ]
    began = cpu()
    llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], params, use_tqdm=False)
    return cpu() - began


def measure(llm: Any, name: str, make: Any) -> dict[str, Any]:
    """CPU seconds of the first token, and tokens of a CPU second after it; the best of three, each time other texts."""
    found: dict[str, Any] = {"mode": name}
    for batch in (1, 8):
        first, rest = [], []
        for run in range(4):  # the first one warms up
            one = timed(llm, [make(number, 2 * run) for number in range(batch)], 1)
            all_of_them = timed(llm, [make(number, 2 * run + 1) for number in range(batch)], TOKENS + 1)
            if run:
                first.append(one)
                rest.append(all_of_them - one)
        found[f"first {batch}"] = round(min(first), 3)
        found[f"tokens {batch}"] = round(batch * TOKENS / min(rest), 1)
    return found


def opened(config: str, connector: bool) -> Any:
    """VLLM's engine, with the connector or without."""
    from vllm import LLM

    from m3runtime.config.schema import Config

    model = Config.load(config).model.path
    if not connector:
        return LLM(model=model, **OPTIONS)
    transfer = {"kv_connector": "MemoryConnector", "kv_connector_module_path": "m3model.vllm.connector",
                "kv_role": "kv_both", "kv_connector_extra_config": {"config": config}}  # fmt: skip
    return LLM(model=model, kv_transfer_config=transfer, async_scheduling=False, **OPTIONS)


def unused(config: str, connector: bool, pipe: "Connection") -> None:
    """Answer when told to, and tell CPU seconds: first tokens and further ones, of 1 request and of 8."""
    llm = opened(config, connector)
    tokenizer = llm.get_tokenizer()

    def asked(number: int, run: str) -> tuple[list[int], None]:
        text = f"Request {run}-{number}." + QUESTION.format(TOPICS[number])
        return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]], None

    while (run := pipe.recv()) is not None:
        found = {}
        for batch in (1, 8):
            firsts = [timed(llm, [asked(number, f"{run}.{each}") for number in range(batch)], 1) for each in range(3)]
            whole = timed(llm, [asked(number, f"{run}.all") for number in range(batch)], TOKENS + 1)
            found[f"first token, batch {batch}"] = statistics.fmean(firsts)
            found[f"decoding, batch {batch}"] = whole - min(firsts)
        pipe.send(found)


def compare_unused(config: str, rounds: int) -> None:
    """Print how much a connector that nothing uses costs, in per cent."""
    spawn = multiprocessing.get_context("spawn")
    pipes = []
    for connector in (False, True):
        ours, theirs = spawn.Pipe()
        spawn.Process(target=unused, args=(config, connector, theirs), daemon=True).start()
        pipes.append(ours)
    found: list[tuple[dict[str, float], dict[str, float]]] = []
    for run in range(rounds + 1):
        pair: list[Any] = [None, None]
        for which in (0, 1) if run % 2 else (1, 0):
            pipes[which].send(run)
            pair[which] = pipes[which].recv()
        if run:  # the first one warms up
            found.append((pair[0], pair[1]))
    for name in found[0][0]:
        ratios = [math.log(with_it[name] / without[name]) for without, with_it in found]
        middle, error = statistics.fmean(ratios), 1.96 * statistics.stdev(ratios) / math.sqrt(rounds)
        lost = [round(100 * math.expm1(middle + one * error), 2) for one in (0, -1, 1)]
        seconds = [round(statistics.fmean(one[which][name] for one in found), 4) for which in (0, 1)]
        print(json.dumps({"what": name, "lost_percent": lost[0], "interval": lost[1:], "cpu_s": seconds}), flush=True)


def work(config: str, connector: bool) -> None:
    from m3runtime.config.schema import Config
    from m3runtime.runtime import Runtime

    settings = Config.load(config)
    if not connector:
        with Runtime.open(settings, read_only=True) as runtime:
            chosen = [[match.id for match in found] for found in runtime.search(TOPICS, 5)]
            texts = [["Reference: " + one.text for one in runtime.references(ids) if one] for ids in chosen]
    else:
        chosen = texts = []
    llm = opened(config, connector)
    tokenizer = llm.get_tokenizer()

    def asked(number: int, run: int) -> list[int]:
        text = f"\n\nRequest {run}-{number}." + QUESTION.format(TOPICS[number])
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    bos = [tokenizer.bos_token_id]
    results = [
        measure(llm, "connector, unused" if connector else "no connector", lambda n, r: (bos + asked(n, r), None))
    ]
    if connector:
        of_vllm = llm.llm_engine.engine_core.engine_core.scheduler.connector
        runtime = of_vllm._runtime
        chosen = [[match.id for match in found] for found in runtime.search(TOPICS, 5)]
        head = of_vllm.head.ids
        results += [
            measure(
                llm, "five memories", lambda n, r: (head + asked(n, r), {"m3": {"ids": chosen[n], "refresh": False}})
            ),
            measure(llm, "recalled", lambda n, r: (head + asked(n, r), {"m3": {"query": f"{TOPICS[n]}, {r}"}})),
        ]
    else:

        def with_text(number: int, run: int) -> tuple[list[int], None]:
            text = f"Run {run}.\n" + "\n\n".join(texts[number])  # no prefix that was read before
            return bos + list(tokenizer(text, add_special_tokens=False)["input_ids"]) + asked(number, run), None

        sizes = [len(with_text(number, 0)[0]) for number in range(8)]
        results.append({**measure(llm, "the same as text", with_text), "prompt": sum(sizes) // 8})
    for one in results:
        print(json.dumps(one), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--unused", type=int, metavar="ROUNDS")
    given = parser.parse_args()
    file = str(given.config.resolve())
    if given.unused:
        compare_unused(file, given.unused)
    else:
        for with_connector in (False, True):
            process = multiprocessing.get_context("spawn").Process(target=work, args=(file, with_connector))
            process.start()
            process.join()
