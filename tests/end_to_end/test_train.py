"""``m3 train``: from texts to a model that reads memories, stopped and started at any moment."""

import json
import random
import shutil
import subprocess
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from m3model.memory3 import NO_LABEL, Memory3ForCausalLM
from m3model.training.sequences import NOTHING, Prepared, TokenRows, TrainingSequences, cut_sequences
from m3runtime.documents.overlap import overlap
from m3runtime.errors import InputError
from m3runtime.lab.bench.timing import threads
from tests.end_to_end.commands import M3, Place, environment
from tests.forked import run
from tests.model.families import TEXT, make_tokenizer

STEPS = 12
STAGES = {"warmup": {"steps": STEPS, "rise": 2}, "memory": {"steps": STEPS, "learning_rate": 1e-3}}


# Forks an `m3 train` for each stage, and kills it once there is a checkpoint.
KILLED_TWICE = """
import os, signal, sys, time
from pathlib import Path
from m3runtime.cli import main

sys.argv = ["m3", "train"]
for stage in ("warmup", "memory"):
    checkpoint = Path("trained/checkpoints", stage, "checkpoint-4/trainer_state.json")
    child = os.fork()
    if not child:
        main()
    while not checkpoint.exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before"
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not Path("trained", stage).exists()
"""


@pytest.fixture
def school(place: Place) -> Place:
    """A place with something to learn: sentences of which each stands in several texts, in another order."""
    rng = random.Random(0)
    words = TEXT.replace(",", "").replace(";", "").split()
    facts = [" ".join(rng.sample(words, 6)) + "." for _ in range(40)]
    texts = [" ".join(rng.sample(facts, 5)) for _ in range(24)]
    place.text("texts.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    place.text("facts.jsonl", "".join(json.dumps({"text": fact}) + "\n" for fact in facts))
    place.configure(
        memory={"layers": "first-half", "tokens_per_head": 4, "reference_tokens": 24},
        recall={"chunk_tokens": 16, "memories": 3, "min_score": -1, "lookahead_tokens": 4, "when_late": "wait"},
        train={
            "data": ["texts.jsonl"],
            "references": ["facts.jsonl"],
            "out": "./trained",
            "sequence_tokens": 64,
            "batch_size": 4,
            "save_every": 4,
            "log_every": 1,
            **STAGES,
        },
    )
    return place


def losses(place: Place, stage: str, out: str = "trained") -> list[Any]:
    found: list[Any] = json.loads((place.folder / out / stage / "losses.json").read_text())
    return found


def test_both_stages_and_what_becomes_of_the_model(school: Place) -> None:
    report = school.m3("train", "--json").json
    assert [stage["name"] for stage in report["stages"]] == ["warmup", "memory"]
    assert report["retrieving"] > 0.9
    assert report["references"] == 40
    for stage in report["stages"]:
        assert [step for step, _ in stage["losses"]] == list(range(1, STEPS + 1))
        assert stage["losses"][-1][1] < stage["losses"][0][1]
    assert list((school.folder / "trained" / "tensorboard" / "memory").glob("events*"))
    model = AutoModelForCausalLM.from_pretrained(report["path"])
    assert isinstance(model, Memory3ForCausalLM)

    # The spec travels with the model: the configuration of its bank says nothing of memories.
    school.configure(memory=None, train=None, model={"path": report["path"]})
    assert school.m3("write", "facts.jsonl", "--json").json["written"] == 40
    spec = school.m3("inspect", "--json").json["spec"]
    assert (spec["layers"], spec["tokens"], spec["reference_tokens"]) == ([0, 1], 4, 24)
    answer = school.m3("ask", "the harbour lamp", "--json").json
    assert answer["memories"]


def test_again_it_is_done_already(school: Place) -> None:
    first = school.m3("train", "--json").json
    written = (school.folder / "trained/memory/model.safetensors").stat().st_mtime_ns
    assert school.m3("train", "--json").json == first
    assert (school.folder / "trained/memory/model.safetensors").stat().st_mtime_ns == written


def test_other_settings_are_refused(school: Place) -> None:
    school.m3("train", "--set", "train.memory.steps=0")
    complaint = school.m3("train", "--set", "train.memory.steps=0", "--set", "train.seed=1").complaint
    assert "trained holds a run with another seed" in complaint
    # How often is logged and saved may change.
    assert school.m3("train", "--set", "train.memory.steps=0", "--set", "train.log_every=2").code == 0


@pytest.mark.parametrize("steps", ["0", "2"])
def test_other_texts_are_refused(school: Place, steps: str) -> None:
    changes = ["--set", "train.warmup.steps=2", "--set", f"train.memory.steps={steps}"]
    assert school.m3("train", *changes).code == 0
    school.text("texts.jsonl", '{"text": "the old harbour lamp burns walnut oil"}\n')
    assert "not those that the run in" in school.m3("train", *changes).complaint


def test_what_goes_on_from_a_memory3_has_its_memories(school: Place) -> None:
    """Its spec, also where references are cut; but what the configuration says goes before it."""
    first = school.m3("train", "--set", "train.warmup.steps=0", "--set", "train.memory.steps=1", "--json").json
    school.configure(memory=None, model={"path": first["path"]}, train={"warmup": {"steps": 0}, "memory": {"steps": 1}})
    second = school.m3("train", "--set", "train.out=./second", "--json").json
    config = AutoModelForCausalLM.from_pretrained(second["path"]).config
    assert (config.memory_layers, config.tokens_per_head, config.reference_tokens) == ([0, 1], 4, 24)
    third = school.m3("train", "--set", "train.out=./third", "--set", "memory.tokens_per_head=2", "--json").json
    config = AutoModelForCausalLM.from_pretrained(third["path"]).config
    assert (config.memory_layers, config.tokens_per_head, config.reference_tokens) == ([0, 1], 2, 24)


def test_a_folder_that_a_kill_left_without_a_claim_is_taken(school: Place) -> None:
    school.text("trained/.train.json.0123456789abcdef.tmp", '{"half')
    assert school.m3("train", "--set", "train.warmup.steps=1", "--set", "train.memory.steps=0").code == 0


def test_a_folder_with_something_else_is_left_alone(school: Place) -> None:
    school.text("trained/precious.txt", "do not touch")
    assert "holds something else" in school.m3("train").complaint
    assert (school.folder / "trained/precious.txt").read_text() == "do not touch"


def test_without_the_section_it_says_so(place: Place) -> None:
    assert "train: the section is missing" in place.m3("train").complaint


def test_nothing_to_learn_from(school: Place) -> None:
    school.text("texts.jsonl", '{"text": " "}\n')
    assert "there is no text" in school.m3("train").complaint


def test_fresh_weights_are_the_seeds(school: Place) -> None:
    found = []
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        changes = {"train.out": f"./{out}", "train.seed": str(seed), "train.start": "config", "train.memory.steps": "0"}
        changes |= {"train.warmup.steps": "1"}
        school.m3("train", *[part for key, value in changes.items() for part in ("--set", f"{key}={value}")])
        found.append(losses(school, "warmup", out)[0]["loss"])
    assert found[0] == found[1] != found[2]
    assert losses(school, "warmup", "one") != losses(school, "warmup", "three")


@pytest.mark.long
def test_killed_it_goes_on_to_the_same_losses(school: Place) -> None:
    """Killed in each stage, after a checkpoint and before the next; the losses are bit for bit those of one run."""
    with threads(1):  # as many as the processes have
        whole = school.m3("train", "--set", "train.out=./whole")
    assert whole.code == 0, whole.err
    done = run(KILLED_TWICE, folder=school.folder)
    assert done.returncode == 0, done.stdout
    with threads(1):
        assert school.m3("train").code == 0
    for stage in ("warmup", "memory"):
        assert losses(school, stage) == losses(school, stage, "whole")
    same = [
        AutoModelForCausalLM.from_pretrained(school.folder / out / "memory").state_dict()
        for out in ("trained", "whole")
    ]
    for name, parameter in same[0].items():
        assert torch.equal(parameter, same[1][name]), name


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(school: Place) -> None:
    school.m3("train", "--set", "train.out=./whole")
    shutil.copytree(school.folder / "whole", school.folder / "trained")
    (school.folder / "trained/train.json").write_text((school.folder / "whole/train.json").read_text())
    shutil.rmtree(school.folder / "trained/memory")
    last = school.folder / f"trained/checkpoints/memory/checkpoint-{STEPS}"
    (last / "trainer_state.json").unlink()
    assert school.m3("train").code == 0
    assert losses(school, "memory") == losses(school, "memory", "whole")


@pytest.mark.slow
def test_two_processes_train_one_model(school: Place) -> None:
    """As torchrun starts them; on a CPU they talk by gloo."""
    school.configure(model={"device": "cpu"})
    torchrun = Path(M3).with_name("torchrun")
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node", "2", "--no-python", M3, "train"],
        cwd=school.folder,
        env={**environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(losses(school, "memory")) == STEPS
    assert (school.folder / "trained/memory/model.safetensors").exists()


def rows_of(rows: list[list[int]]) -> TokenRows:
    """Rows as they are read back."""
    with tempfile.TemporaryDirectory() as folder:
        TokenRows.write(Path(folder) / "rows", rows)
        return TokenRows.open(Path(folder) / "rows")


@given(
    documents=st.lists(st.lists(st.integers(1, 99), max_size=20), max_size=8),
    length=st.integers(2, 9),
    end=st.sampled_from([None, 0]),
    pack=st.booleans(),
)
def test_sequences_hold_the_documents_in_order(
    documents: list[list[int]], length: int, end: int | None, pack: bool
) -> None:
    whole = [[*document, *([] if end is None else [end])] for document in documents]
    try:
        cut = list(cut_sequences([[part[:3], part[3:]] for part in documents], length, end, pack=pack))
    except InputError:
        assert not any(len(row) > 1 for row in whole) or (pack and sum(map(len, whole)) < 2) or length < 2
        return
    assert all(1 < len(row) <= length for row in cut)
    flowing = [token for row in whole for token in row]
    if pack:
        joined = [token for row in cut for token in row]
        assert joined == flowing[: len(joined)]
        assert len(flowing) - len(joined) < length
    else:
        pieces = [row[start : start + length] for row in whole for start in range(0, len(row), length)]
        assert cut == [piece for piece in pieces if len(piece) > 1]


def test_sequences_go_to_a_file_as_they_come(tmp_path: Path) -> None:
    """A few of them are in memory, and a document is in pieces."""
    documents = ([list(range(1000, 2000))] * 10 for _ in range(200))
    tracemalloc.start()
    try:
        TokenRows.write(tmp_path / "rows", cut_sequences(documents, 64, 0, pack=True))
        rows = TokenRows.open(tmp_path / "rows")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(rows) == 200 * 10_001 // 64
    assert most < rows.tokens.nbytes / 8


@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    retrieved=st.lists(st.integers(-1, 4), min_size=6, max_size=6),
    reading=st.booleans(),
)
def test_batches_hold_what_was_prepared(counts: list[int], retrieved: list[int], reading: bool) -> None:
    references = rows_of([[number + 1] * count for number, count in enumerate(counts)])
    chosen = np.array([one if one < len(counts) else NOTHING for one in retrieved], np.int32).reshape(2, 3)
    prepared = Prepared(rows_of([[5, 6, 7, 8], [9, 10]]), references, chosen)
    data = TrainingSequences(prepared, reading=reading, begin=3)
    batch = data.collate([data[0], data[1]])
    begin = [] if reading else [3]
    assert batch["input_ids"].tolist() == [[*begin, 5, 6, 7, 8], [*begin, 9, 10, 0, 0]]
    assert batch["labels"].tolist() == [[*begin, 5, 6, 7, 8], [*begin, 9, 10, NO_LABEL, NO_LABEL]]
    if not reading:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        return
    assert len(batch["references"]) == len(set(chosen.flat))
    for row in range(2):
        for chunk in range(3):
            one, place = int(chosen[row, chunk]), batch["reference_places"][row, chunk]
            wanted = [] if one == NOTHING else [one + 1] * counts[one]
            assert batch["reference_counts"][place] == len(wanted)
            assert batch["references"][place, : len(wanted)].tolist() == wanted
            assert not batch["references"][place, len(wanted) :].any()


def test_what_the_text_holds_is_not_retrieved(school: Place) -> None:
    school.m3("train", "--set", "train.warmup.steps=1", "--set", "train.memory.steps=1")
    (prepared,) = (school.folder / "trained").glob("data-*")
    found = Prepared.open(prepared)
    tokenizer = make_tokenizer()
    assert (found.retrieved != NOTHING).any()
    for row in range(len(found.sequences)):
        text = tokenizer.decode(found.sequences.row(row).tolist(), skip_special_tokens=True)
        for one in found.retrieved[row]:
            if one != NOTHING:
                assert overlap(tokenizer.decode(found.references.row(one).tolist()), text) <= 0.9
