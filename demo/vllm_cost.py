"""The cost of memories inside vLLM, against the same references as text: the figures of docs/vllm.md.

Run it in the environment of `make test-vllm`, with nothing else on the machine:

    OMP_NUM_THREADS=1 .venv-vllm/bin/python demo/vllm_cost.py m3.yaml

`vllm_unused.py` has what a connector costs that nothing uses.
"""

import argparse
import json
import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

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

    from m3model.vllm.settings import checkpoint_of
    from m3runtime.config.schema import Config

    model = checkpoint_of(Config.load(config))
    if not connector:
        return LLM(model=model, **OPTIONS)
    transfer = {"kv_connector": "MemoryConnector", "kv_connector_module_path": "m3model.vllm.connector",
                "kv_role": "kv_both", "kv_connector_extra_config": {"config": config}}  # fmt: skip
    return LLM(model=model, kv_transfer_config=transfer, async_scheduling=False, **OPTIONS)


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
    file = str(parser.parse_args().config.resolve())
    for with_connector in (False, True):
        process = multiprocessing.get_context("spawn").Process(target=work, args=(file, with_connector))
        process.start()
        process.join()
