"""`Steps`: what the steps of a training have computed, in files, so that an interruption loses one step at most."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from m3runtime.errors import CodecError
from m3runtime.storage.files import write_atomically

_KEY = "key"
_DIGEST = 16


class Steps:
    """The steps of one training in one folder, or nowhere without one. Names are file names. Thread-safe.

    ``key`` stands for everything that the results depend on: what another training left in the folder is removed.
    """

    def __init__(self, folder: Path | None = None, key: str = "") -> None:
        """Raises `CodecError` if the folder cannot be made."""
        self._folder = folder
        if folder is None:
            return
        try:
            if not (folder / _KEY).is_file() or (folder / _KEY).read_text(errors="replace") != key:
                self.remove()
                folder.mkdir(parents=True)
                write_atomically(folder / _KEY, key.encode())
        except OSError as error:
            raise CodecError(f"{folder}: the training cannot be kept there: {error.strerror}") from error

    def take(self, name: str, work: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The tensors of a step, on the CPU: those it computed before, or else those of ``work``, which are kept."""
        if self._folder is None:
            return work()
        path = self._folder / name
        if (kept := _read(path)) is not None:
            return kept
        found = {key: tensor.contiguous() for key, tensor in work().items()}
        data = safetensors.torch.save(found)
        try:
            write_atomically(path, xxhash.xxh3_128_digest(data) + data)
        except OSError as error:
            raise CodecError(f"{path}: cannot be written: {error.strerror}") from error
        return found

    def remove(self) -> None:
        """Remove all that was kept. Raises `OSError`."""
        if self._folder is not None and self._folder.exists():
            shutil.rmtree(self._folder)


def _read(path: Path) -> Mapping[str, Tensor] | None:
    """The tensors of a file that `Steps.take` wrote; None if there is none, or it is damaged."""
    try:
        data = path.read_bytes()
        if xxhash.xxh3_128_digest(data[_DIGEST:]) == data[:_DIGEST]:
            return safetensors.torch.load(data[_DIGEST:])
    except (OSError, SafetensorError):
        pass
    return None
