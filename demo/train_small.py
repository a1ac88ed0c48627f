"""A Memory³ from scratch in a coffee break: `make train-small` trains it, and asks it for facts it never saw.

A model of a million parameters reads text about people who do not exist: who wears, owns and fears what. It is trained
in the two stages of Memory³ (section 3.6) and, as a control, with memory from the first step. Then all are asked for
facts about people that no training text mentions, in five ways. Everything is seeded.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from m3model.adapter import TransformersAdapter
from m3runtime import assembly
from m3runtime.adapter import Prompt, TrainReport
from m3runtime.cli.progress import stages
from m3runtime.config import Config
from m3runtime.evaluation.banks import write_bank
from m3runtime.evaluation.losses import draw_losses
from m3runtime.runtime import Runtime
from m3runtime.text import Document

ROOT = Path(__file__).parent.parent
RELATIONS = ("wears", "owns", "fears", "paints", "sells", "eats")
TOLD = 3
"""Facts of each person."""
PEOPLE, HELD_OUT = 20_000, 300
DOCUMENTS = 16_000
STATEMENTS = 12
"""Of a document."""
SETTINGS: dict[str, Any] = {
    "memory": {
        "preset": "memory3",
        "reference_tokens": 16,
        "tokens_per_head": 8,
    },
    "recall": {"chunk_tokens": 5, "memories": 5, "min_score": -1, "lookahead_tokens": 0, "when_late": "wait"},
    "embedder": {"kind": "words:Words", "path": "words"},
}
TRAIN: dict[str, Any] = {
    "start": "config",
    "pack": False,
    "sequence_tokens": 5 * STATEMENTS + 1,
    "batch_size": 32,
    "save_every": 500,
    "log_every": 50,
}
WARMUP = {"steps": 2000, "learning_rate": 2e-3, "rise": 100}
MEMORY = {"steps": 1000, "learning_rate": 1e-3, "rise": 50}
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}

console = Console(width=118, highlight=False)


@dataclass(frozen=True)
class Person:
    """Somebody, and what is told of them."""

    name: str
    facts: tuple[tuple[str, str], ...]

    def statements(self) -> list[str]:
        return [f"{self.name} {relation} {value} ." for relation, value in self.facts]

    def reference(self) -> str:
        return " ".join(self.statements())


def words(count: int, rng: Random, taken: set[str]) -> list[str]:
    """Words that nobody uses."""
    found: list[str] = []
    while len(found) < count:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        if word not in taken:
            taken.add(word)
            found.append(word)
    return found


class World:
    """People, and texts about some of them."""

    def __init__(self, seed: int = 0) -> None:
        rng, taken = Random(seed), set[str]()
        self.first, self.last, self.values = (words(count, rng, taken) for count in (160, 160, 100))
        names = [f"{first} {last}" for first in self.first for last in self.last]
        self.people = [
            Person(name, tuple((relation, rng.choice(self.values)) for relation in rng.sample(RELATIONS, TOLD)))
            for name in rng.sample(names, PEOPLE + HELD_OUT)
        ]
        self.known, self.held_out = self.people[:PEOPLE], self.people[PEOPLE:]
        self.documents = [self._document(rng) for _ in range(DOCUMENTS)]

    def _document(self, rng: Random) -> str:
        """Half of the documents say everything twice, in another order: what copying is learned from.

        The others say twelve things about twelve people. Only memory can tell those.
        """
        if rng.random() < 0.5:
            told = [
                statement for person in rng.sample(self.known, STATEMENTS // 6) for statement in person.statements()
            ]
            return " ".join([*told, *rng.sample(told, len(told))])
        return " ".join(rng.choice(person.statements()) for person in rng.sample(self.known, STATEMENTS))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A token for each word."""
        special = ["<s>", "</s>", "<unk>", "Reference:", "."]
        vocabulary = [*special, *RELATIONS, *self.first, *self.last, *self.values]
        tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(vocabulary)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def prepare(world: World, folder: Path) -> None:
    """The configuration of a model without weights, its tokenizer, and the texts."""
    tokenizer = world.tokenizer()
    config = LlamaConfig(**MODEL, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=None)
    config.save_pretrained(folder / "fresh")
    tokenizer.save_pretrained(folder / "fresh")
    write_lines(folder / "data.jsonl", world.documents)
    write_lines(folder / "people.jsonl", [person.reference() for person in world.known])


def write_lines(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))


def config_of(folder: Path, **sections: Mapping[str, Any]) -> Config:
    return Config.model_validate(
        {"bank": folder / "bank", "model": {"path": str(folder / "fresh"), "device": "cpu"}, **SETTINGS, **sections}
    )


def run(folder: Path, name: str, warmup: Mapping[str, Any], memory: Mapping[str, Any]) -> TrainReport:
    """One training, or what is left of it."""
    settings = {**TRAIN, "data": [folder / "data.jsonl"], "references": [folder / "people.jsonl"]}
    settings |= {"out": folder / name, "warmup": warmup, "memory": memory}
    names = {"retrieve": f"{name}: retrieving", "warmup": f"{name}: warmup", "memory": f"{name}: with memory"}
    with stages(names, shown=True) as progress:
        return TransformersAdapter.train(config_of(folder, train=settings), progress)


MODES: dict[str, dict[str, Any]] = {
    "no memory": {},
    "sparse memory": {"codec": {"kind": "raw"}},
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
    settings = config_of(folder, model={"path": model, "device": "cpu"}, bank=bank, **changes)
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
                    Prompt(" ".join([*(one.text for one in reversed(row) if one), text]))
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
    torch.set_num_threads(max(1, torch.get_num_threads()))
    folder = ROOT / ".train-small"
    folder.mkdir(exist_ok=True)
    began = time.perf_counter()
    world = World()
    if not (folder / "people.jsonl").exists():
        prepare(world, folder)
    console.rule("[bold]Training: warmup, then with memory; as a control with memory from the first step")
    steps = {**MEMORY, "steps": WARMUP["steps"] + MEMORY["steps"], "learning_rate": WARMUP["learning_rate"]}
    two = run(folder, "two-stages", WARMUP, MEMORY)
    control = run(folder, "control", {"steps": 0}, steps)
    draw_losses({stage.name: stage.losses for stage in (*two.stages, *control.stages)}, folder / "losses.png")
    trained = {
        "after warmup": two.stages[0].path,
        "after training with memory": two.path,
        "control: memory from the first step": control.path,
    }
    console.rule(f"[bold]{len(world.held_out) * TOLD} facts about people of whom no training text tells")
    table = Table("right, of all", *MODES)
    results: dict[str, dict[str, float]] = {}
    for name, path in trained.items():
        results[name] = {mode: ask(world, path, mode, folder) for mode in MODES}
        table.add_row(name, *(f"{100 * share:.1f} %" for share in results[name].values()))
    console.print(table)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    console.print(f"{(time.perf_counter() - began) / 60:.0f} minutes; losses: {folder / 'losses.png'}")


if __name__ == "__main__":
    sys.exit(main())
