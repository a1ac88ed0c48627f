"""Installs into a folder what a machine without a network lacks: ``python tests/gpu/install.py SITE WHEELS``.

The wheels go in without dependencies, and the entry points of pyproject.toml make this source tree an installed
project: plug-ins are found by them.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main(site: Path, wheels: Path) -> None:
    """Fill ``site``."""
    site.mkdir(parents=True, exist_ok=True)
    files = sorted(map(str, wheels.glob("*.whl")))
    options = ["-q", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    if files:
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=True)
    write_entry_points(site)


def write_entry_points(site: Path) -> None:
    """Write the metadata of an installed m3runtime."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = ["[console_scripts]", *(f"{name} = {value}" for name, value in project["scripts"].items())]
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    folder = site / "m3runtime-0.0.0.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: m3runtime\nVersion: 0.0.0\n", encoding="utf-8")
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "RECORD").write_text("", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
