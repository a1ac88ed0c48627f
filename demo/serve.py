"""Serve the demo's bank, and print the address of its page. Run it with ``make serve``, after ``make demo``."""

import sys
from pathlib import Path

import models
from m3runtime.cli.serve import serve

ROOT = Path(__file__).parent.parent


def main() -> None:
    if not (ROOT / ".demo/bank/home").exists():
        sys.exit("the demo's bank is not there yet; `make demo` writes it")
    models.smollm2(ROOT / ".cache/models")
    serve(config=ROOT / "demo/m3.yaml", set=[f"embedder.path={models.minilm()}"])


if __name__ == "__main__":
    main()
