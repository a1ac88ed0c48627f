"""Loading a model and its tokenizer from a local folder, a hub name or a GGUF file, and telling models apart."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

from m3runtime.errors import ConfigError
from m3runtime.memory.spec import canonical_json, fingerprint

SAMPLE = 65_536
"""Elements of each parameter that its fingerprint reads: training changes them all, and reading all takes long."""

_IDENTITY = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "vocab_size",
)


def load(path: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Return ``(model, tokenizer)``, the model in evaluation mode on its device.

    ``path`` is a folder, a hub name, or a ``.gguf`` file (de-quantised while loading). ``dtype`` and ``device`` may be
    ``auto``: the checkpoint's own dtype on an accelerator and float32 on the CPU; the accelerator if there is one.
    Raises `ConfigError` with one line if nothing can be loaded from there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import m3model.memory3  # noqa: F401 - registers its model with the two classes above

    place, source = find_device(device), source_of(path)
    wanted = ("float32" if place.type == "cpu" else "auto") if dtype == "auto" else dtype
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(**source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source, dtype=wanted if wanted == "auto" else getattr(torch, wanted), output_loading_info=True
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
    return model.to(place).eval(), tokenizer


def first_line(error: Exception) -> str:
    """What an error of a library says first, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def source_of(path: str) -> dict[str, Any]:
    """Arguments of the library's ``from_pretrained``. Raises `ConfigError` for a file or folder that is not there."""
    file = Path(path)
    if file.suffix == ".gguf":
        if not file.is_file():
            raise ConfigError(f"model.path: no such file: {path}")
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    if file.is_absolute() or path.startswith((".", "~")):
        if not file.expanduser().is_dir():
            raise ConfigError(f"model.path: no such folder: {path}")
        return {"pretrained_model_name_or_path": str(file.expanduser())}
    return {"pretrained_model_name_or_path": path}


def configuration_of(path: str) -> Any:
    """The model's own configuration; no weights are read. Raises `ConfigError` with one line if there is none."""
    from transformers import AutoConfig

    import m3model.memory3  # noqa: F401 - registers its configuration with the class above

    source = source_of(path)
    try:
        with quiet():
            return AutoConfig.from_pretrained(**source)
    except Exception as error:  # of many kinds: each file format's library raises its own
        raise ConfigError(f"model.path: cannot read what model is in {path}: {first_line(error)}") from error


def find_device(name: str) -> torch.device:
    """The device that ``model.device`` names. Raises `ConfigError` if this machine has none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.device: no device {name!r} on this machine") from error
    return device


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers reports its progress on standard error, where `m3` shows its own."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with without_bars():
            yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of transformers' own; what it warns of is said."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def model_fingerprint(model: Any) -> str:
    """Thirty-two hex digits over the architecture and a sample of every parameter.

    Parameters are read as bfloat16, so that a checkpoint loaded as float32 and as bfloat16 is the same model.
    """
    config = model.config.get_text_config().to_dict()
    state = xxhash.xxh3_128(canonical_json({key: config.get(key) for key in _IDENTITY}).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)].to(torch.bfloat16).cpu()
        state.update(f"{name}{tuple(parameter.shape)}".encode())
        state.update(sample.view(torch.int16).numpy().data)
    return state.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Thirty-two hex digits over what turns text into token ids."""
    pieces = sorted(tokenizer.get_vocab().items())
    probe = "Explicit memory, 64 tokens: naïve — 12,345 ½ \t\n  x+=1; Ünïcödé"
    ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
    return fingerprint({"vocabulary": pieces, "probe": ids, "special": sorted(tokenizer.all_special_ids)})
