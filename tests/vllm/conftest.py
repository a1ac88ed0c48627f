"""A bank of the demo's handbook, SmolLM2 behind vLLM and behind our adapter, in one process. See `make test-vllm`.

vLLM allows one engine in a process, so each file here is run by a pytest of its own.
"""

import os
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import pytest
import xxhash

from m3model.adapter import TransformersAdapter
from m3runtime import assembly
from m3runtime.bank.bias import BIAS
from m3runtime.cli.demo import HANDBOOK
from m3runtime.config.schema import Config
from m3runtime.documents.reading import read_documents
from m3runtime.documents.splitting import Splitter
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.runtime import Runtime
from m3runtime.writing.calibrating import calibrate_bias
from m3runtime.writing.fitting import fit_codec
from m3runtime.writing.writer import Writer

if TYPE_CHECKING:
    from tests.vllm.both import Both

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

# Before vLLM is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

CACHE = Path(__file__).parents[2] / ".cache"
TOPICS = ("assert", "class", "comparisons", "exceptions", "function", "raise")


@pytest.fixture(scope="session")
def config(smollm2_path: Path, minilm_path: Path) -> Config:
    """The demo's configuration, but with a product codec from the first reference on: so small a bank stays int8."""
    bank = CACHE / "vllm" / f"{xxhash.xxh3_64_hexdigest(HANDBOOK.read_bytes())}-product"
    return Config.model_validate(
        {
            "bank": bank,
            "codec": {"file": bank.with_suffix(".codec")},
            "model": {"path": str(smollm2_path), "dtype": "float32", "device": "cpu"},
            "memory": {"attention_temperature": 0.9},
            "embedder": {"path": str(minilm_path), "device": "cpu"},
            "tiers": [{"kind": "lmdb"}],
            "recall": {"when_late": "wait"},
            "generate": {"prompt": "reference", "max_new_tokens": 24, "stop": ["\n"]},
        }
    )


@pytest.fixture(scope="session")
def adapter(config: Config) -> Iterator[TransformersAdapter]:
    """Our own adapter, with the bank written by it: once for all runs, since that takes two minutes."""
    adapter = assembly.open_adapter(config)
    assert isinstance(adapter, TransformersAdapter)
    if not (config.bank / BIAS).exists():
        assert config.codec.file is not None
        config.bank.parent.mkdir(parents=True, exist_ok=True)
        codec = assembly.make_codec(config, adapter.spec)
        splitter = Splitter(adapter.count_tokens, max_tokens=adapter.spec.reference_tokens)
        with closing(ReferenceSpool(read_documents([HANDBOOK]), splitter)) as references:
            fit_codec(codec, adapter, [one.text for one in references], config.memory.batch_size)
        codec.save(config.codec.file)
        report = Writer(config, adapter, assembly.open_embedder(config)).write(read_documents([HANDBOOK]))
        assert report.references > 30
        text = config.bank.with_suffix(".txt")
        text.write_text("\n\n".join(topics[name] for name in TOPICS))
        calibrate_bias(config, length=1024, texts=[text])
    yield adapter
    adapter.close()


@pytest.fixture(scope="session")
def runtime(config: Config, adapter: TransformersAdapter) -> Iterator[Runtime]:
    with Runtime.open(config, read_only=True) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    """Arguments of vLLM's engine; a module may have its own."""
    return {}


@pytest.fixture(scope="module")
def both(runtime: Runtime, adapter: TransformersAdapter, options: dict[str, Any]) -> "Iterator[Both]":
    """The same questions to both."""
    from tests.vllm.both import Both  # not without vLLM

    both = Both(runtime, adapter, options)
    yield both
    both.close()
