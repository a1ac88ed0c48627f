"""GGUF files: each is converted once, into a folder that later starts read in a second."""

import errno
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock

from m3runtime.memory.spec import fingerprint

log = logging.getLogger("m3runtime")

_FLOAT32 = 4
"""Bytes of a float32, in which weights are de-quantised without a loss."""


def cache_folder() -> Path:
    """The folder of this user's conversions: ``m3runtime/models`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3runtime" / "models"


def folder_of(file: Path) -> Path:
    """The folder for the conversion of a file as it is now: it changes with the file's path, size and time."""
    real, state = file.resolve(), file.stat()
    return cache_folder() / f"{_stem(real)}{fingerprint([state.st_size, state.st_mtime_ns])[:12]}"


def converted(file: Path, read: Callable[[], tuple[Any, Any]]) -> Path | None:
    """The folder of a file's conversion, made now if there is none; None if it cannot be kept.

    ``read`` gives the model in float32 and its tokenizer; what it raises is raised. Several processes may call it: one
    converts, the others wait for it. An interrupted conversion leaves no folder behind, and conversions of the same
    file as it was before are removed.
    """
    folder = folder_of(file)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f"{folder.name}.lock")
        lock.acquire()
    except OSError as error:
        log.warning("%s is converted at every start: %s: %s", file, folder.parent, error.strerror)
        return None
    try:
        if not folder.is_dir():
            log.warning("converting %s, once, into %s", file, folder)
            model, tokenizer = read()
            _publish(model, tokenizer, folder)
            for other in folder.parent.glob(f"{_stem(file.resolve())}*"):
                if other.is_dir() and other != folder:
                    shutil.rmtree(other, ignore_errors=True)
    except _NoRoomError as error:
        log.warning("%s is converted at every start: %s", file, error)
        return None
    finally:
        lock.release()
    return folder


class _NoRoomError(Exception):
    """A conversion cannot be written."""


def _publish(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model whose weights are plain float32. The folder appears whole or not at all."""
    size = _FLOAT32 * sum(weights.numel() for weights in model.parameters())
    try:
        if size > shutil.disk_usage(folder.parent).free:
            raise OSError(errno.ENOSPC, f"{folder.parent} has no room for {size} bytes")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as temporary:
            made = Path(temporary) / "model"
            save(model, tokenizer, made)
            made.rename(folder)  # which publishes it
    except OSError as error:
        raise _NoRoomError(error.strerror or str(error)) from error


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model that was read from a GGUF file, and its tokenizer, as the transformers library reads them."""
    # The weights are plain float32; marked as quantised, they would not be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def without_bar() -> Iterator[None]:
    """Hide the bar of a conversion, which is not one of those that transformers can turn off."""
    library: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    bar = library.tqdm
    library.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        library.tqdm = bar


def _stem(real: Path) -> str:
    """The beginning of the names of a file's conversions."""
    return f"{real.stem}-{fingerprint(str(real))[:12]}-"
