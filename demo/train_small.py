"""A Memory³ from scratch in half an hour: `make train-small` trains it and asks it for facts it never saw.

A model of 0.2 million parameters reads text about people who do not exist, in words that do not exist. It is
trained in the two stages of Memory³ (section 3.6). A control has memory from the first step. Then
both are asked for facts about people of whom no training text tells, in six ways. Everything is seeded.
"""

import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from m3model.training.run import TransformersTrainer
from m3runtime import assembly
from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.training import StageReport
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.lab.evaluation.banks import write_bank
from m3runtime.lab.evaluation.losses import draw_losses
from m3runtime.runtime import Runtime
from people import STATEMENTS, TOLD, World

ROOT = Path(__file__).parent.parent
IN_PROMPT = 3
"""References that stand in a prompt as text; with more it would be longer than any training text."""
SETTINGS: dict[str, Any] = {
    "memory": {"preset": "memory3", "reference_tokens": 16, "tokens_per_head": 8},
    "recall": {"chunk_tokens": 5, "memories": 5, "min_score": -1, "lookahead_tokens": 0, "when_late": "wait"},
    "embedder": {"kind": "words:Words", "path": "words"},
}
TRAIN: dict[str, Any] = {
    "pack": False,
    "sequence_tokens": 5 * STATEMENTS + 1,
    "batch_size": 64,
    "save_every": 500,
    "log_every": 25,
}
FIRST = {"steps": 2500, "learning_rate": 4e-3, "rise": 100}
"""Settings for the documents that repeat themselves, from which the model learns to copy."""
THEN = {"steps": 3500, "learning_rate": 4e-3, "rise": 100}
"""Settings for the documents that do not."""
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "attention_bias": True,  # attending to the token before, whatever it is, takes but a bias
    "initializer_range": 0.04,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 30.0},  # texts are short
    "tie_word_embeddings": True,
}

console = Console(width=118, highlight=False)


def prepare(world: World, folder: Path) -> None:
    """Write the configuration of a model without weights, its tokenizer, and the texts."""
    tokenizer = world.tokenizer()
    config = LlamaConfig(**MODEL, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=None)
    config.save_pretrained(folder / "fresh")
    tokenizer.save_pretrained(folder / "fresh")
    write_lines(folder / "copying.jsonl", world.copying)
    write_lines(folder / "telling.jsonl", world.telling)
    write_lines(folder / "people.jsonl", [person.reference() for person in world.known])


def write_lines(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))


def config_of(folder: Path, model: str, **sections: Any) -> Config:
    return Config.model_validate(
        {"bank": folder / "bank", "model": {"path": model, "device": "cpu"}, **SETTINGS, **sections}
    )


def run(folder: Path, name: str, begin: str, texts: str, stage: str, settings: Mapping[str, Any]) -> StageReport:
    """Run or resume one stage of training: from a model's folder, on one of the files."""
    train = {**TRAIN, "data": [folder / f"{texts}.jsonl"], "references": [folder / "people.jsonl"]}
    train |= {"out": folder / name, "start": "config" if begin.endswith("fresh") else "weights"}
    train |= {"warmup": {"steps": 0}, "memory": {"steps": 0}, stage: settings}
    return TransformersTrainer().train(config_of(folder, begin, train=train), lambda *_: None).stages[0]


def train(folder: Path, name: str, stage: str) -> list[StageReport]:
    """Train a model from scratch: in ``stage`` on texts that repeat themselves, then with memory on the others."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    first = run(folder, f"{name}-first", str(folder / "fresh"), "copying", stage, FIRST)
    console.print(f"{name}: {first.steps} steps, loss {first.losses[-1][1]:.3f}, {time.perf_counter() - began:.0f} s")
    then = run(folder, name, first.path, "telling", "memory", THEN)
    console.print(f"{name}: {then.steps} more, loss {then.losses[-1][1]:.3f}, {time.perf_counter() - began:.0f} s")
    return [first, then]


ARMS = {"two-stages": "warmup", "control": "memory"}
"""Names of the models, and the stage in which each reads its first texts."""
MODES: dict[str, dict[str, Any]] = {
    "no memory": {},
    "sparse memory": {"codec": {"kind": "raw"}},
    "sparse memory, the nearest alone": {"codec": {"kind": "raw"}, "recall": {**SETTINGS["recall"], "memories": 1}},
    "quantised sparse memory": {"codec": {"kind": "product", "preset": "memory3"}},
    "dense memory": {
        "codec": {"kind": "raw"},
        "memory": {**SETTINGS["memory"], "layers": "all", "tokens_per_head": "all"},
    },
    "text in the prompt": {"codec": {"kind": "raw"}},
}


def ask(world: World, model: str, mode: str, folder: Path) -> float:
    """The share of facts about people of whom no training text tells that the model completes rightly."""
    changes = MODES[mode]
    bank = folder / "banks" / f"{Path(model).parent.name}-{Path(model).name}-{mode.replace(' ', '-')}"
    settings = config_of(folder, model, bank=bank, **changes)
    adapter = assembly.open_adapter(settings)
    questions = [(f"{person.name} {relation}", value) for person in world.held_out for relation, value in person.facts]
    references = [person.reference() for person in world.held_out]
    documents = [Document(f"person-{number}", text) for number, text in enumerate(references)]
    embedder = assembly.open_embedder(settings)
    write_bank(settings, adapter, embedder, documents, None)
    embedder.close()
    generate = settings.generate.model_copy(update={"max_new_tokens": 1})
    right = 0
    with Runtime.open(settings) as runtime:
        for start in range(0, len(questions), 30):
            part = questions[start : start + 30]
            prompts, streams = [Prompt(text) for text, _ in part], None
            if mode == "text in the prompt":
                found = [
                    runtime.references([match.id for match in row]) for row in runtime.search([q for q, _ in part])
                ]
                prompts = [
                    Prompt(" ".join([*(one.text for one in reversed(row[:IN_PROMPT]) if one), text]))
                    for row, (text, _) in zip(found, part, strict=True)
                ]
            elif mode != "no memory":
                streams = [runtime.stream(adapter.dtype) for _ in part]
            answers = adapter.generate(prompts, streams, generate)
            right += sum(answer.text.strip() == value for answer, (_, value) in zip(answers, part, strict=True))
            for stream in streams or ():
                stream.close()
    return right / len(questions)


def main() -> None:
    folder = ROOT / ".train-small"
    folder.mkdir(exist_ok=True)
    began = time.perf_counter()
    world = World()
    if not (folder / "people.jsonl").exists():
        prepare(world, folder)
    console.rule("[bold]Training: warmup, then with memory; as a control with memory from the first step")
    # Models so small gain little by a second thread: each has a core of its own.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        runs = {name: pool.submit(train, folder, name, stage) for name, stage in ARMS.items()}
        two, control = (runs[name].result() for name in ARMS)
    for name, stages in (("two-stages", two), ("control", control)):
        draw_losses({"first texts": stages[0].losses, "then": stages[1].losses}, folder / f"losses-{name}.png")
    trained = {
        "after warmup only": two[0],
        "after training with memory": two[1],
        "control: memory from the start": control[1],
    }
    console.rule(f"[bold]{len(world.held_out) * TOLD} facts about people of whom no training text tells")
    table = Table("right, of all", *MODES)
    results: dict[str, dict[str, float]] = {}
    for name, stage in trained.items():
        results[name] = {mode: ask(world, stage.path, mode, folder) for mode in MODES}
        table.add_row(name, *(f"{100 * share:.1f} %" for share in results[name].values()))
    console.print(table)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    console.print(f"{(time.perf_counter() - began) / 60:.0f} minutes; losses, models and results: {folder}")


if __name__ == "__main__":
    main()
