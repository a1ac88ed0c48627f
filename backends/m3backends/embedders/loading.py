"""`LocalEmbedder`: the base of embedders that run a model on this machine, and how they find and load it."""

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash

from m3runtime.device.threads import turn
from m3runtime.errors import ConfigError, PluginError
from m3runtime.memory.spec import canonical_json
from m3runtime.plugins import hub
from m3runtime.retrieval.embedder import Embedder, Embeddings

SAMPLE = 65_536
"""The number of elements of one parameter that a fingerprint covers at most."""

# Formats of the same weights for other frameworks, often as large again.
_NOT_FETCHED = ["*.onnx", "onnx/*", "openvino/*", "*.h5", "*.ot", "*.msgpack", "*.gguf", "imgs/*"]

PROBE = "The Quick brown-fox's naïve CAFÉ,  3.14\tand 2,048!\nΓιώργος Москва 東京都 नमस्ते 😀"  # noqa: RUF001
"""Case, accents, white space, other scripts: tokenizers that agree on it and on their vocabulary are the same."""


# The plug-in as messages name it, and the extra of m3runtime that installs its packages.
_NAMED = {
    "sentence-transformers": ("embedder sentence-transformers", "sentence-transformers"),
    "flag-embedding": ("embedder flag-embedding", "bge"),
    "cross-encoder": ("reranker cross-encoder", "sentence-transformers"),
    "late-interaction": ("reranker late-interaction", "sentence-transformers"),
}


class LocalEmbedder(Embedder):
    """An embedder whose model is loaded; a subclass computes the vectors, one call at a time under `lock`."""

    kind: ClassVar[str]
    """The plug-in's name, for messages."""

    def __init__(self, dim: int, fingerprint: str) -> None:
        self._dim = dim
        self._fingerprint = fingerprint
        self.lock = threading.Lock()

    @contextmanager
    def turn(self, device: torch.device, *, is_query: bool) -> Iterator[None]:
        """Compute in the block, alone on this embedder. On a CPU the steps of models wait for queries, which are short.

        In long calls with references they go on beside.
        """
        with self.lock, turn(device) if is_query else nullcontext():
            yield

    @classmethod
    def dim_of(cls, path: str, options: Mapping[str, Any]) -> int | None:  # noqa: ARG003 - no option changes it
        """The length of the vectors, from the model's configuration; see `Embedder.dim_of`."""
        folder = Path(path).expanduser()
        try:
            if not folder.is_dir():
                client = import_extra("huggingface_hub", cls.kind)
                folder = Path(client.snapshot_download(path, local_files_only=True))
            return _stated_dim(folder)
        except (OSError, ValueError, KeyError, TypeError, PluginError):
            return None  # not here, or not readable

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._dim

    @property
    def fingerprint(self) -> str:
        """Thirty-two hex digits over weights, tokenizer, pooling, text before texts, and the longest text."""
        return self._fingerprint


def import_extra(module: str, kind: str) -> Any:
    """Import an optional dependency. Raises `PluginError` that says which extra installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        name, extra = _NAMED[kind]
        raise PluginError(f"{name} needs {module} ({_line(error)}): pip install 'm3runtime[{extra}]'") from error


def find_model(path: str | Path, kind: str) -> Path:
    """The local folder of a model, which is given as a folder or by a hub name and fetched if it is missing.

    The hub is never asked for a name that looks like a path. Raises `ConfigError` if the folder does not exist or the
    hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if isinstance(path, Path) or name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1:
        raise ConfigError(f"{_NAMED[kind][0]}: there is no model folder {path}")
    client, reachable = import_extra("huggingface_hub", kind), hub.is_reachable()
    try:
        return Path(client.snapshot_download(name, ignore_patterns=_NOT_FETCHED, local_files_only=not reachable))
    except (OSError, ValueError) as error:
        reason = _line(error) if reachable else f"the hub cannot be reached; {hub.ADVICE}"
        raise ConfigError(
            f"{_NAMED[kind][0]}: {name} is neither a folder nor a model that could be fetched from the hub ({reason})"
        ) from error


def _stated_dim(folder: Path) -> int:
    """The length of the vectors of a model's folder: that of its last module that states one."""

    def stated(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    dim = int(stated("config.json")["hidden_size"])
    for module in stated("modules.json") if (folder / "modules.json").is_file() else ():
        if module["type"].endswith((".Pooling", ".Dense")):
            config = stated(f"{module['path']}/config.json")
            keys = ("out_features", "embedding_dimension", "word_embedding_dimension")
            dim = int(next(config[key] for key in keys if key in config))
    return dim


@contextmanager
def quietly(path: str | Path, kind: str) -> Iterator[None]:
    """Load a model in the block without progress bars and log lines. An error becomes a `ConfigError` of one line."""
    from safetensors import SafetensorError

    logging = import_extra("transformers.utils.logging", kind)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (UnpicklingError, EOFError) as error:
        # torch's own message tells how to load such a file in spite of the danger.
        raise ConfigError(
            f"{_NAMED[kind][0]}: {path} cannot be loaded: its weights are damaged, or more than weights"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"{_NAMED[kind][0]}: {path} cannot be loaded: {_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def model_fingerprint(
    parameters: Iterable[tuple[str, torch.Tensor]],
    vocabulary: Mapping[str, int],
    probe: Sequence[int],
    settings: Mapping[str, Any],
) -> str:
    """Thirty-two hex digits (XXH3-128) over weights, tokenizer and settings. ``probe`` are the tokens of `PROBE`.

    Each parameter counts with its name, its shape and at most `SAMPLE` elements, evenly spread and in float16, so a
    model has one fingerprint on every device and in every dtype that it runs in.
    """
    state = xxhash.xxh3_128()
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, -(-len(flat) // SAMPLE))].to(torch.float16).cpu()
        state.update(canonical_json([name, list(parameter.shape)]).encode())
        state.update(sample.numpy().tobytes())
    about = {
        "vocabulary": sorted(vocabulary.items()),
        "probe": list(probe),
        "settings": settings,
    }
    state.update(canonical_json(about).encode())
    return state.hexdigest()


def share_of(token: int | None, ids: Sequence[Sequence[int]]) -> float:
    """The share of a token among all; 0 if there is no such token."""
    count = sum(map(len, ids))
    return sum(row.count(token) for row in map(list, ids)) / count if count and token is not None else 0.0


def unit_rows(rows: Sequence[Embeddings] | Embeddings, dim: int, kind: str) -> Embeddings:
    """``float32[n, dim]``, every row of length 1. Raises `ConfigError` for a row without direction."""
    vectors = np.asarray(rows, np.float64).reshape(-1, dim)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ConfigError(f"{_NAMED[kind][0]}: a vector without direction; the model's weights are damaged")
    unit: Embeddings = (vectors / lengths).astype(np.float32)
    return unit


def batch_of(batch_size: int | None, device: str) -> int:
    """Texts of one forward pass: as is said, or as many as the device takes without a loss."""
    return batch_size or (32 if device == "cpu" else 256)


def check_counts(kind: str, **counts: int) -> None:
    """Raise `ConfigError` unless every option is at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{_NAMED[kind][0]}: {name} must be at least 1, not {count}")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
