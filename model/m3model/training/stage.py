"""One of the two stages of training, warmup or memory, run by transformers' Trainer.

The Trainer contributes checkpoints, resuming, precision, several devices and TensorBoard.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from m3model.loading.models import without_bars
from m3model.memory3 import Memory3ForCausalLM
from m3model.training.compiling import compile_training
from m3model.training.sequences import TrainingSequences
from m3runtime.config.train import StageConfig, TrainConfig
from m3runtime.errors import ConfigError

_STATE = "trainer_state.json"
_BETA2 = 0.95
"""Beta 2 of Adam, as language models are trained; runs may be too short for the library's 0.999."""

OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Loss:
    """One entry of the log."""

    step: int
    loss: float
    """Mean loss of predicting a token, in nats, over the steps since the last one logged."""
    learning_rate: float


def run_stage(
    name: str,
    model: Memory3ForCausalLM,
    data: TrainingSequences,
    settings: TrainConfig,
    stage: StageConfig,
    progress: OnStep,
) -> list[Loss]:
    """Train the model in place, from the last whole checkpoint of this stage on. Returns the logged losses.

    Steps are the same whether or not the run was stopped in between: order of sequences, optimiser and random numbers
    are those of the checkpoint. Raises `ConfigError` for a precision that the device does not compute in.
    """
    if settings.compile if settings.compile is not None else model.device.type == "cuda":
        compile_training(model)
    checkpoints = settings.out / "checkpoints" / name
    last = last_checkpoint(checkpoints)
    trainer = Trainer(
        model=model,
        args=_arguments(checkpoints, settings, stage, model.device),
        train_dataset=data,
        data_collator=data.collate,
        callbacks=[_Progress(progress), _board(settings.out / "tensorboard" / name)],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is the command's
    with without_bars():
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return [
        Loss(int(entry["step"]), entry["loss"], entry["learning_rate"])
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end. Others, which a kill left behind, are removed.

    The state is the last file of a checkpoint that Trainer writes, so it tells that the others are there.
    """
    whole: dict[int, Path] = {}
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            step = json.loads((checkpoint / _STATE).read_text())["global_step"]
        except (OSError, ValueError, KeyError):
            shutil.rmtree(checkpoint)
            continue
        whole[step] = checkpoint
    return whole[max(whole)] if whole else None


def _arguments(folder: Path, settings: TrainConfig, stage: StageConfig, device: torch.device) -> TrainingArguments:
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=stage.steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulate,
            learning_rate=stage.learning_rate,
            lr_scheduler_type="constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
            warmup_steps=stage.rise,
            weight_decay=stage.weight_decay,
            adam_beta2=_BETA2,
            max_grad_norm=stage.max_gradient,
            save_steps=settings.save_every,
            save_total_limit=2,
            logging_steps=settings.log_every,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # which would wait for the device at every step
            seed=settings.seed,
            data_seed=settings.seed,
            use_cpu=device.type == "cpu",
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to=[],
            dataloader_pin_memory=device.type != "cpu",
            bf16=settings.precision == "bfloat16",
            fp16=settings.precision == "float16",
        )
    except ValueError as error:
        raise ConfigError(f"train.precision: {settings.precision} cannot be computed on {device}: {error}") from error
    if arguments.parallel_mode.name != "DISTRIBUTED":
        # Several GPUs in one process would have the model copied at every step; torchrun starts one for each.
        arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _board(folder: Path) -> TensorBoardCallback:
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))


class _Progress(TrainerCallback):
    def __init__(self, progress: OnStep) -> None:
        self._progress = progress

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.is_world_process_zero:
            self._progress(state.global_step, args.max_steps)
