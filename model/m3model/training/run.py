"""`TransformersTrainer`: trains a Memory³ of any causal language model in two stages (Memory³, section 3.6)."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from m3model.attention.layout import AttentionLayout
from m3model.loading.fingerprint import tokenizer_fingerprint
from m3model.loading.models import (
    configuration_of,
    first_line,
    load,
    quiet,
    source_of,
)
from m3model.loading.spec import carried
from m3model.memory3 import Memory3Config, Memory3ForCausalLM
from m3model.training.preparing import prepare
from m3model.training.sequences import NOTHING, Prepared, TrainingSequences
from m3model.training.stage import Loss, run_stage
from m3runtime.adapters.training import StageReport, Trainer, TrainReport
from m3runtime.config.schema import Config
from m3runtime.config.train import StageConfig, TrainConfig
from m3runtime.device.resolve import resolve
from m3runtime.errors import ConfigError
from m3runtime.memory.shape import kept_tokens, memory_layers
from m3runtime.storage.files import sync_folder, write_atomically
from m3runtime.writing.writer import OnProgress

_SETTINGS = "train.json"
_LOSSES = "losses.json"
_MAY_CHANGE = {"out", "save_every", "log_every", "compile"}
"""Settings of ``train`` that a run may go on with when they have changed."""


class TransformersTrainer(Trainer):
    """Trains a `Memory3ForCausalLM` of any causal language model of the transformers library."""

    def train(self, config: Config, progress: OnProgress) -> TrainReport:
        """Train in two stages, or resume where a run of the same settings stopped. Finished stages are not repeated.

        Leaves in ``train.out`` a folder for each stage (``warmup``, ``memory``) with the model after it, which
        ``model.path`` and ``from_pretrained`` take, its tokenizer and its losses; and ``checkpoints`` and
        ``tensorboard``. Started by torchrun or ``accelerate launch``, it trains on all their processes' devices.

        Raises `ConfigError` for settings that do not fit each other or the run that is in ``train.out``, and
        `InputError` for texts without anything to learn from.
        """
        settings = config.train
        if settings is None:
            raise ConfigError("train: the section is missing; it says what to learn from and where the model goes")
        processes = PartialState(cpu=config.model.device == "cpu")
        tokenizer = _tokenizer(config)
        # What goes on from a Memory³ has its memories, as far as nothing else is said.
        config = config.model_copy(update={"memory": carried(configuration_of(config.model.path), config.memory)})
        with processes.main_process_first():
            _claim(config, settings, tokenizer)
            prepared = prepare(config, settings, tokenizer, progress)
        reports: list[StageReport] = []
        model = None
        for name, stage in (("warmup", settings.warmup), ("memory", settings.memory)):
            if not stage.steps:
                continue
            folder = settings.out / name
            if not folder.exists():
                model = model or _start(config, settings, tokenizer, after=reports[-1].path if reports else None)
                data = TrainingSequences(prepared, reading=name == "memory", begin=tokenizer.bos_token_id)
                losses = run_stage(name, model, data, settings, stage, partial(progress, f"Training, stage {name}"))
                if processes.is_main_process:
                    _keep(model, tokenizer, losses, folder)
                processes.wait_for_everyone()
            reports.append(_report(name, stage, folder))
        return TrainReport(
            stages=tuple(reports),
            path=reports[-1].path,
            sequences=len(prepared.sequences),
            tokens=int(prepared.sequences.counts.sum()),
            references=len(prepared.references),
            retrieving=float((prepared.retrieved != NOTHING).sum() / max(1, _chunks(config, prepared))),
        )


def _chunks(config: Config, prepared: Prepared) -> int:
    return int((-(-prepared.sequences.counts // config.recall.chunk_tokens)).sum())


def _tokenizer(config: Config) -> Any:
    source = source_of(config.model.path)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # of many kinds: each file format's library raises its own
        raise ConfigError(
            f"model.path: cannot load a tokenizer from {config.model.path}: {first_line(error)}"
        ) from error
    return tokenizer


def _claim(config: Config, settings: TrainConfig, tokenizer: Any) -> None:
    """Note in ``train.out`` the settings of its run. Raises `ConfigError` if they are another run's."""
    wanted = {
        **settings.model_dump(mode="json", exclude=_MAY_CHANGE),
        "model": config.model.path,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "memory": config.memory.model_dump(mode="json", exclude={"batch_size", "attention_weight", "select_by"}),
        "chunk_tokens": config.recall.chunk_tokens,
        "memories": config.recall.memories,
        "embedder": config.embedder.model_dump(mode="json"),
    }
    path = settings.out / _SETTINGS
    if path.exists():
        there = json.loads(path.read_text())
        differing = [key for key in wanted if there.get(key) != wanted[key]]
        if differing:
            raise ConfigError(
                f"train.out: {settings.out} holds a run with another {differing[0]}; "
                "choose another folder, or remove this one"
            )
        return
    if settings.out.exists() and any(not file.name.startswith(f".{_SETTINGS}.") for file in settings.out.iterdir()):
        raise ConfigError(f"train.out: {settings.out} holds something else; choose another folder")
    settings.out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(wanted, indent=1, ensure_ascii=False).encode())


def _start(config: Config, settings: TrainConfig, tokenizer: Any, after: str | None) -> Memory3ForCausalLM:
    """The model to train: that of an earlier stage, one with the weights of ``model.path``, or with fresh ones."""
    torch.manual_seed(settings.seed)
    device = resolve(config.model.device)
    if after is None and settings.start == "config":
        with _loading(config.model.path), quiet():
            classes: Any = AutoModelForCausalLM  # whose methods have no types
            model = classes.from_config(configuration_of(config.model.path), dtype=torch.float32)
    else:
        model, _ = load(after or config.model.path, "float32", device)
    model = model.to(device).train()
    if isinstance(model, Memory3ForCausalLM):
        model = model.language_model
    return Memory3ForCausalLM.holding(model, memory3_config(model, tokenizer, config))


def memory3_config(model: Any, tokenizer: Any, config: Config) -> Memory3Config:
    """The configuration of a Memory³ of this model, with memories as the configuration has them."""
    memory = config.memory
    if (memory.place, memory.sinks, memory.positions) != ("start", "once", "parallel"):
        raise ConfigError("memory: a model is trained with place start, sinks once and positions parallel")
    if memory.select_by != "attention" and kept_tokens(memory) < memory.reference_tokens:
        raise ConfigError("memory.select_by must be attention: by it a model is trained to choose tokens")
    if isinstance(memory.tokens_per_head, tuple):
        raise ConfigError(
            "memory.tokens_per_head must be all or one number: a model is trained with no budgets of heads"
        )
    layout = AttentionLayout.of(model)
    if layout.again:
        raise ConfigError("model.path: a model whose layers run several times cannot be trained")
    if not layout.alike and kept_tokens(memory) < memory.reference_tokens:
        raise ConfigError(
            "memory.tokens_per_head must be all: the layers of this model have heads of several shapes, and it is "
            "not trained to choose tokens"
        )
    bos = tokenizer.bos_token_id
    sink = tokenizer(memory.sink, add_special_tokens=False)["input_ids"]
    sink_ids = [*([] if bos is None else [bos]), *sink]
    if not sink_ids:
        raise ConfigError("memory.sink: the sink has no token; this model needs some text there")
    return Memory3Config(
        text_config=model.config,
        memory_layers=list(memory_layers(memory, layout.layers)),
        tokens_per_head=kept_tokens(memory),
        reference_tokens=memory.reference_tokens,
        sink=memory.sink,
        sink_ids=sink_ids,
        chunk_tokens=config.recall.chunk_tokens,
        memories=config.recall.memories,
    )


def _keep(model: Memory3ForCausalLM, tokenizer: Any, losses: list[Loss], folder: Path) -> None:
    """Write the folder of a finished stage, whole or not at all."""
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    with quiet():
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    (unfinished / _LOSSES).write_text(json.dumps([asdict(one) for one in losses]))
    unfinished.replace(folder)
    sync_folder(folder.parent)


def _report(name: str, stage: StageConfig, folder: Path) -> StageReport:
    rows = json.loads((folder / _LOSSES).read_text())
    losses = tuple((row["step"], row["loss"]) for row in rows)
    return StageReport(name=name, steps=stage.steps, losses=losses, path=str(folder))


@contextmanager
def _loading(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of many kinds: each file format's library raises its own
        raise ConfigError(f"model.path: cannot make a causal language model of {path}: {first_line(error)}") from error
