"""One tiny random model behind vLLM and behind our adapter: ``python -m tests.vllm.family qwen3 FOLDER``.

vLLM allows one engine in a process, so each family has one of its own. The result is printed as JSON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Before vLLM is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from m3model.adapter import TransformersAdapter
from m3runtime import assembly
from m3runtime.adapters.answers import Prompt
from m3runtime.config.schema import Config
from m3runtime.documents.reading import read_documents
from m3runtime.runtime import Runtime
from m3runtime.writing.calibrating import calibrate_bias
from m3runtime.writing.writer import Writer
from tests.model.families import make_tokenizer, random_text

LENGTH = 128
SIZE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "sliding_window": None,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)


def save(family: str, folder: Path, seed: int = 1) -> None:
    """A model whose queries have much in common, as those of trained models do, and whose norms are not all ones."""
    tokenizer = make_tokenizer(eos=False)
    config = AutoConfig.for_model(family, **SIZE, vocab_size=len(tokenizer))
    torch.manual_seed(seed)
    make: Any = AutoModelForCausalLM
    model = make.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
        table = model.get_input_embeddings().weight
        table += 5.0 * table.std() * torch.randn(table.shape[1])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def written(folder: Path) -> Config:
    """A bank of 24 references, with bias directions."""
    config = Config.model_validate(
        {
            "bank": folder / "bank",
            "model": {"path": str(folder / "model"), "dtype": "float32", "device": "cpu"},
            "memory": {"reference_tokens": 24},
            "codec": {"kind": "raw"},
            "embedder": {"kind": "tests.end_to_end.embedders:HashedWords", "path": "hashed"},
            "tiers": [{"kind": "lmdb"}],
            "recall": {"when_late": "wait", "chunk_tokens": 16, "lookahead_tokens": 0, "score_temperature": None},
        }
    )
    tokenizer = make_tokenizer(eos=False)
    file = folder / "references.jsonl"
    file.write_text("".join(json.dumps({"text": random_text(tokenizer, 20, n)}) + "\n" for n in range(24)))
    adapter = assembly.open_adapter(config)
    Writer(config, adapter, assembly.open_embedder(config)).write(read_documents([file]))
    adapter.close()
    calibrate_bias(config, length=LENGTH)
    return config


def compare(config: Config) -> dict[str, Any]:
    """Answers by one memory, by three, and by others after each chunk."""
    from tests.vllm.both import Ask, Both

    adapter = assembly.open_adapter(config)
    assert isinstance(adapter, TransformersAdapter)
    with Runtime.open(config, read_only=True) as runtime:
        prompt = Prompt(random_text(make_tokenizer(eos=False), 12, seed=77))
        named = [((3,),), ((5,),), ((1, 2, 4),), ((), (7, 8), (9,))]
        asks = [Ask(prompt, 40, ids) for ids in named]
        # Ours first: of some families vLLM changes the class of the transformers library that our adapter runs.
        alone = Both.__new__(Both)
        alone.runtime, alone.adapter = runtime, adapter
        ours = alone.ours(asks)
        both = Both(runtime, adapter, {"max_model_len": 384, "max_num_seqs": 8})
        theirs = both.theirs(asks)
        one, other = (got.log_probs[0] for got in theirs[:2])
        found = {
            "equal": [got.tokens == own.tokens for own, got in zip(ours, theirs, strict=True)],
            "difference": max(map(both.difference, ours, theirs)),
            "apart": max(abs(one[token] - other.get(token, one[token])) for token in one),
        }
        both.close()
    adapter.close()
    return found


def main() -> None:
    family, folder = sys.argv[1], Path(sys.argv[2])
    save(family, folder / "model")
    sys.stdout.write(json.dumps(compare(written(folder))) + "\n")


if __name__ == "__main__":
    main()
