"""Loading a model and its tokenizer from a local folder, a hub name or a GGUF file."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from m3model import memory3
from m3model.loading import gguf
from m3runtime.errors import ConfigError
from m3runtime.plugins import hub

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def load(path: str, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """Return ``(model, tokenizer)``, the model in evaluation mode on ``device``.

    ``path`` is a folder, a hub name, or a ``.gguf`` file, which is converted once (`m3model.loading.gguf`). The
    ``dtype`` ``auto`` is the checkpoint's own on an accelerator and float32 on the CPU. Raises `ConfigError` with one
    line if nothing can be loaded from there.
    """
    memory3.register()
    source = source_of(path)
    wanted = ("float32" if device.type == "cpu" else "auto") if dtype == "auto" else dtype
    if "gguf_file" in source:
        with quiet():
            folder = gguf.converted(Path(path), lambda: read(path, source, "float32"))
        source = source if folder is None else {"pretrained_model_name_or_path": str(folder)}
    model, tokenizer = read(path, source, wanted)
    return model.to(device).eval(), tokenizer


def read(path: str, source: dict[str, Any], dtype: str) -> tuple[Any, Any]:
    """The model and the tokenizer of a source. Raises `ConfigError`, which names ``path``."""
    try:
        with quiet(), gguf.without_bar() if "gguf_file" in source else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(**source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source, dtype=dtype if dtype == "auto" else getattr(torch, dtype), output_loading_info=True
            )
            model, info = loaded
    except Exception as error:  # of many kinds: each file format's library raises its own
        raise ConfigError(
            f"model.path: cannot load a causal language model from {path}: {first_line(error)}"
        ) from error
    if missing := sorted(info["missing_keys"]):  # which transformers fills with random numbers
        raise ConfigError(
            f"model.path: cannot load a causal language model from {path}: "
            f"it lacks {len(missing)} of the weights, such as {missing[0]}"
        )
    return model, tokenizer


def first_line(error: Exception) -> str:
    """The first line of a library's error, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def source_of(path: str) -> dict[str, Any]:
    """Arguments of the library's ``from_pretrained``; a GGUF file's conversion if there is one.

    Raises `ConfigError` if the file or folder is missing.
    """
    file = Path(path)
    if file.suffix == ".gguf":
        if not file.is_file():
            raise ConfigError(f"model.path: no such file: {path}")
        if (folder := gguf.folder_of(file)).is_dir():
            return {"pretrained_model_name_or_path": str(folder)}
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    if file.is_absolute() or path.startswith((".", "~")):
        if not file.expanduser().is_dir():
            raise ConfigError(f"model.path: no such folder: {path}")
        return {"pretrained_model_name_or_path": str(file.expanduser())}
    return _of_the_hub(path)


def _of_the_hub(name: str) -> dict[str, Any]:
    """A model of the hub, or a folder in the working directory. Without a hub, a model that was fetched before.

    Raises `ConfigError` for a name that no model of the hub has, and for one that cannot be fetched.
    """
    if Path(name).is_dir():
        return {"pretrained_model_name_or_path": name}
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(
            f"model.path: cannot load a causal language model from {name}: no such folder in {Path.cwd()}, and no name "
            f"on the hub; {hub.ADVICE}"
        )
    if hub.is_reachable():
        return {"pretrained_model_name_or_path": name}
    if try_to_load_from_cache(name, "config.json") is None:
        raise ConfigError(
            f"model.path: cannot load a causal language model from {name}: no such folder in {Path.cwd()}, and the hub "
            f"cannot be reached; {hub.ADVICE}"
        )
    return {"pretrained_model_name_or_path": name, "local_files_only": True}


def configuration_of(path: str) -> Any:
    """The model's own configuration; no weights are read. Raises `ConfigError` with one line if there is none."""
    memory3.register()
    source = source_of(path)
    try:
        with quiet():
            return AutoConfig.from_pretrained(**source)
    except Exception as error:  # of many kinds: each file format's library raises its own
        raise ConfigError(f"model.path: cannot read what model is in {path}: {first_line(error)}") from error


def tokenizer_of(path: str) -> Any:
    """The model's tokenizer alone. Raises `ConfigError` with one line if there is none."""
    memory3.register()
    source = source_of(path)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # of many kinds: each file format's library raises its own
        raise ConfigError(f"model.path: cannot read the tokenizer in {path}: {first_line(error)}") from error


def generation_of(path: str) -> Any:
    """The model's generation configuration, or the one that its own configuration makes."""
    source = source_of(path)
    try:
        return GenerationConfig.from_pretrained(source.pop("pretrained_model_name_or_path"), **source)
    except OSError:  # a model need not have one
        return GenerationConfig.from_model_config(configuration_of(path))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, which reports its progress on standard error, where `m3` shows its own."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with without_bars():
            yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of transformers; its warnings are still shown."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
