"""The example of docs/embed.md, run as it is written."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from m3runtime import Config, Runtime
from m3runtime.testing.embedder import EmbedderContract, MakeEmbedder
from tests.end_to_end.commands import records

DOCUMENT = Path(__file__).parents[2] / "docs" / "embed.md"
TEXTS = ["The harbour lamp burns walnut oil.", "The ferry to Uskerfold takes 55 minutes.", "Monday is market day."]
QUESTION = " How long does the ferry take?"

# Runs the example as a program, then looks at what it loaded.
RUN = """
import runpy, sys
shown = runpy.run_path("run.py", run_name="__main__")
assert "transformers" not in sys.modules and "m3model" not in sys.modules
print([[len(chunk), len(chunk.late)] for chunk in shown["recalled"]])
"""


# Three commands, as ``m3`` runs them, in one process.
COMMANDS = """
import sys
from m3runtime.cli import main
for arguments in (["write", "notes.jsonl", "--json"], ["search", "the ferry", "--json"], ["ask", "Which oil?"]):
    sys.argv = ["m3", *arguments]
    try:
        main()
    except SystemExit as exit:
        print(arguments[0], exit.code)
"""


def python(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the document's files, each named by the comment that it begins with."""
    folder = tmp_path_factory.mktemp("embed")
    blocks = re.findall(r"^```(?:python|yaml)\n(# (\S+)\n.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.S | re.M)
    assert [name for _, name in blocks] == ["toy_stack.py", "run.py", "m3.yaml"]
    for text, name in blocks:
        assert max(map(len, text.splitlines())) <= 120
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ran(example: Path) -> "subprocess.CompletedProcess[str]":
    return python(example, "-c", RUN)


@pytest.fixture(scope="module")
def toy_stack(example: Path) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.syspath_prepend(example)
        import toy_stack

        yield toy_stack
        del sys.modules["toy_stack"]


def open_runtime(example: Path, **recall: object) -> Runtime:
    config = Config.load(example / "m3.yaml", environ={}, overrides={f"recall.{k}": str(v) for k, v in recall.items()})
    return Runtime.open(config, read_only=True)


def test_the_example_runs_without_transformers(ran: "subprocess.CompletedProcess[str]") -> None:
    assert ran.returncode == 0, ran.stderr
    first, *chunks, counts = ran.stdout.splitlines()
    assert first == "3 memories written, 0 known"
    assert "ferry to Uskerfold" in chunks[0]
    assert len(chunks) == 3  # one of the prompt, and two in 150 bytes
    delivered = json.loads(counts)
    assert delivered[0] == [2, 0]  # the prompt waits
    assert [memories + late for memories, late in delivered] == [2, 2, 2]


def test_parity(ran: "subprocess.CompletedProcess[str]", example: Path, toy_stack: ModuleType) -> None:
    """A recalled memory at its own positions gives the logits of the same text in the context."""
    with open_runtime(example, memories=1) as runtime:
        adapter = toy_stack.ToyAdapter(toy_stack.Decoder(), runtime.config.memory)
        adapter.check(runtime.bank.manifest, runtime.bank.path)
        for text in TEXTS:
            reference, question = toy_stack.tokenize(text), toy_stack.tokenize(QUESTION)
            expected = adapter.model(reference + question, adapter.sequence(room=0))[len(reference) :]
            nothing = adapter.model(question, adapter.sequence(room=len(reference)))
            with runtime.stream() as stream:
                recalled = stream.recall(text, wait=True)
            assert [one.text for one in recalled.references] == [text]
            whole, stepwise = (adapter.sequence(room=len(reference)) for _ in range(2))
            whole.read(recalled)
            stepwise.read(recalled)
            torch.testing.assert_close(adapter.model(question, whole), expected, atol=1e-4, rtol=0)
            steps = torch.cat([adapter.model([token], stepwise) for token in question])
            torch.testing.assert_close(steps, expected, atol=1e-4, rtol=0)
            assert (nothing - expected).abs().max() > 0.01  # the memory does matter


def test_weights_tell_memories_apart(
    ran: "subprocess.CompletedProcess[str]", example: Path, toy_stack: ModuleType
) -> None:
    """With a score temperature near zero all but the best memory weigh nothing."""
    question = toy_stack.tokenize(QUESTION)

    def logits(**recall: object) -> torch.Tensor:
        with open_runtime(example, **recall) as runtime, runtime.stream() as stream:
            adapter = toy_stack.ToyAdapter(toy_stack.Decoder(), runtime.config.memory)
            sequence = adapter.sequence(room=adapter.spec.reference_tokens)
            sequence.read(stream.recall(QUESTION, wait=True))
            return adapter.model(question, sequence)

    one, two = logits(memories=1), logits(memories=2, score_temperature="null")
    weighted = logits(memories=2, score_temperature=1e-3)
    torch.testing.assert_close(weighted, one, atol=1e-4, rtol=0)
    assert (two - one).abs().max() > 0.01


def test_reading_nothing(ran: "subprocess.CompletedProcess[str]", example: Path, toy_stack: ModuleType) -> None:
    with open_runtime(example) as runtime, runtime.stream(torch.bfloat16) as stream:
        recalled = stream.recall(" ")
        keys, values = recalled.layer(0)
        assert keys.shape == values.shape == (toy_stack.KV_HEADS, 0, toy_stack.HEAD_DIM)
        assert keys.dtype == torch.bfloat16
        assert keys.device == runtime.device
        adapter = toy_stack.ToyAdapter(toy_stack.Decoder(), runtime.config.memory)
        sequence = adapter.sequence(room=0)
        sequence.read(recalled)
        question = toy_stack.tokenize(QUESTION)
        assert torch.equal(adapter.model(question, sequence), adapter.model(question, adapter.sequence(room=0)))


def test_the_commands_know_the_adapter(ran: "subprocess.CompletedProcess[str]", example: Path, tmp_path: Path) -> None:
    for name in ("toy_stack.py", "m3.yaml"):
        shutil.copy(example / name, tmp_path)
    (tmp_path / "notes.jsonl").write_text(records(TEXTS), encoding="utf-8")

    done = python(tmp_path, "-c", COMMANDS)
    written, *codes = done.stdout.splitlines()
    assert json.loads(written)["written"] == 3
    assert codes[0] == "write 0"
    assert TEXTS[1] in codes[1]
    assert codes[2:] == ["search 0", "ask 2"]
    assert done.stderr.strip() == "m3: model.adapter: ToyAdapter only writes memories, it does not generate by itself"


class TestWordEmbedder(EmbedderContract):
    @pytest.fixture(scope="class")
    @staticmethod
    def make_embedder(toy_stack: ModuleType) -> MakeEmbedder:
        return lambda: toy_stack.WordEmbedder(path="words")
