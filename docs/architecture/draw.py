"""Draws the pictures of the architecture page: `python docs/architecture/draw.py` writes house.svg and chunk.svg.

The floors of the house come from the layers contract in pyproject.toml, so the picture shows what CI enforces.
"""

import tomllib
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

INK, SOFT, LINE, PAPER, HOME, WING, MARK = "#1f2937", "#6b7280", "#9ca3af", "#ffffff", "#eef2ff", "#ecfdf5", "#4338ca"
ROW, GAP, FLOOR_GAP, MARGIN, NAMES = 58, 10, 16, 24, 140

PACKAGES = {
    "m3runtime": ROOT / "m3runtime",
    "m3model": ROOT / "model" / "m3model",
    "m3backends": ROOT / "backends" / "m3backends",
}

# The first layer of each floor, as the contract orders them from the top, and the floor's name.
FLOORS = {
    "cli": "commands",
    "lab": "tools",
    "runtime": "public face",
    "writing": "changing a bank",
    "adapters": "recalling",
    "bank": "keeping",
    "observe": "data",
    "config": "foundation",
}
ROOMS = {
    "m3runtime": {
        "adapters": "contract of a model",
        "assembly": "configuration to parts",
        "bank": "manifest and index",
        "cli": "the command m3",
        "codecs": "memories to bytes",
        "config": "YAML to objects",
        "device": "where it computes",
        "documents": "files to references",
        "errors": "the error tree",
        "lab": "evaluation, benchmarks",
        "memory": "spec, tensors, block",
        "observe": "metrics, timeline",
        "planning": "size and cost",
        "plugins": "names to classes",
        "recall": "ids to parts",
        "retrieval": "text to ids",
        "runtime": "an open bank",
        "storage": "bytes in tiers",
        "stream": "one sequence",
        "serve": "the HTTP API",
        "testing": "contract suites",
        "writing": "write, verify, repair",
    },
    "m3model": {
        "adapter": "the Adapter",
        "attention": "memories in attention",
        "bias": "weights in plain slots",
        "engine": "decoding in chunks",
        "loading": "files to models",
        "memory3": "trained models",
        "remote": "vLLM at a URL",
        "training": "m3 train",
        "vllm": "memories inside vLLM",
        "transformers": "MemoryModel",
    },
    "m3backends": {
        "embedders": "text to vectors",
        "lmdb": "the home",
        "slabs": "gpu, pinned",
        "usearch": "nearest ids",
    },
}


def contract(package: str) -> list[list[str]]:
    """The layers of a package from the top; rooms of one layer do not import each other."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one.get("layers", [""])[0].startswith(f"{package}."))
    return [[name.strip().removeprefix(f"{package}.") for name in layer.split("|")] for layer in layers]


def floors() -> list[tuple[str, list[str]]]:
    """The core's rooms, floor by floor from the top, each floor from left to right."""
    found: list[tuple[str, list[str]]] = []
    for layer in contract("m3runtime"):
        if layer[0] in FLOORS:
            found.append((FLOORS[layer[0]], []))
        found[-1][1].extend(layer)
    return found


class Picture:
    """An SVG that grows by boxes, texts and arrows."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{SOFT}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="12" fill="{PAPER}"/>',
        ]

    def box(self, x: int, y: int, width: int, height: int, fill: str, *, line: str = LINE) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{line}"/>'
        )

    def text(
        self, x: int, y: int, text: str, *, size: int = 13, at: str = "middle", fill: str = INK, bold: bool = False
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{at}" fill="{fill}"{weight}>{escape(text)}</text>'
        )

    def room(self, x: int, y: int, width: int, name: str, says: str, fill: str, height: int = ROW) -> None:
        """A box with a name, and below it what the room is for."""
        self.box(x, y, width, height, fill)
        self.text(x + width // 2, y + height // 2 - 4, name, size=15, bold=True)
        self.text(x + width // 2, y + height // 2 + 15, says, size=12, fill=SOFT)

    def arrow(self, *points: tuple[int, int], dashed: bool = False) -> None:
        path = " ".join(f"{x} {y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<path d="M{path}" fill="none" stroke="{SOFT}" stroke-width="1.5" marker-end="url(#tip)"{dash}/>'
        )

    def path(self, way: str, fill: str) -> None:
        self.parts.append(f'<path d="{way}" fill="{fill}" stroke="{LINE}" stroke-linejoin="round"/>')

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def label(package: str, room: str) -> str:
    """The room's name as a listing of its package shows it."""
    return f"{room}.py" if (PACKAGES[package] / f"{room}.py").exists() else f"{room}/"


def house() -> str:
    """The rooms of the three packages, the core in the middle."""
    storeys = floors()
    wing, core, between, top = 190, 790, 50, 132
    left = MARGIN + wing + between
    right = left + core + between
    bottom = top + len(storeys) * (ROW + FLOOR_GAP)
    picture = Picture(right + wing + MARGIN, bottom + 96, "The rooms of m3runtime, m3model and m3backends")

    eaves = top - 16
    picture.path(f"M{left - 14} {eaves} L{left + core // 2} 22 L{left + core + 14} {eaves}z", HOME)
    picture.box(left, eaves, core, bottom - eaves, HOME)
    picture.text(left + core // 2, 80, "m3runtime", size=22, bold=True, fill=MARK)
    picture.text(left + core // 2, 104, "a room imports rooms below it, or to its right on its floor", fill=SOFT)
    for number, (name, rooms) in enumerate(storeys):
        y = top + number * (ROW + FLOOR_GAP)
        picture.text(left + 14, y + ROW // 2 + 4, name, at="start", size=12, fill=MARK)
        width = (core - NAMES - GAP * len(rooms)) // len(rooms)
        for place, room in enumerate(rooms):
            x = left + NAMES + place * (width + GAP)
            picture.room(x, y, width, label("m3runtime", room), ROOMS["m3runtime"][room], PAPER)

    for x, package in ((MARGIN, "m3model"), (right, "m3backends")):
        rooms = stack(package)
        height = len(rooms) * (ROW + GAP) + 52
        picture.box(x, bottom - height, wing, height, WING)
        picture.text(x + wing // 2, bottom - height + 30, package, size=18, bold=True, fill=MARK)
        for number, room in enumerate(rooms):
            y = bottom - height + 44 + number * (ROW + GAP)
            picture.room(x + 10, y, wing - 20, label(package, room), ROOMS[package][room], PAPER)
    level = bottom - 2 * ROW
    picture.arrow((left - between, level), (left, level))
    picture.arrow((right, level), (right - between, level))
    under = bottom + 34
    plugins = left + core // 2
    picture.arrow(
        (plugins, bottom), (plugins, under), (MARGIN + wing // 2, under), (MARGIN + wing // 2, bottom), dashed=True
    )
    picture.arrow(
        (plugins, bottom), (plugins, under), (right + wing // 2, under), (right + wing // 2, bottom), dashed=True
    )
    picture.text(
        plugins,
        under + 24,
        "solid: imports · dashed: found by name at run time (entry points, import paths)",
        fill=SOFT,
    )
    return picture.svg()


def stack(package: str) -> list[str]:
    """The rooms of a package from the top: as its contract orders them, or by name where there is none."""
    if package == "m3model":
        return [room for layer in contract(package) for room in layer]
    return sorted(ROOMS[package])


def chunk() -> str:
    """The way of a chunk: from its text to attention."""
    wide, high, space = 190, 66, 42
    columns = [MARGIN + 12 + place * (wide + space) for place in range(5)]
    upper, lower, turn = 36, 208, 136
    picture = Picture(columns[4] + wide + MARGIN + 12, 364, "The way of a chunk, from its text to attention")

    stations = [
        ("chunk", "text of 64 tokens", HOME),
        ("Embedder", "a unit vector", HOME),
        ("Index", "ids and scores", HOME),
        ("MemoryStore", "parts, by id and dtype", WING),
        ("attention", "memories, sink, context", HOME),
    ]
    for x, (name, says, fill) in zip(columns, stations, strict=True):
        picture.room(x, upper, wide, name, says, fill, high)
    for x in columns[:4]:
        picture.arrow((x + wide, upper + high // 2), (x + wide + space, upper + high // 2))
    picture.text(columns[3] + wide + space // 2, upper + high // 2 - 10, "lease", size=12, fill=MARK)

    picture.box(MARGIN, lower - 36, columns[2] + wide + 12 - MARGIN, high + 48, WING)
    says = "Hierarchy: encoded blocks move up; digests are checked"
    picture.text(columns[0], lower - 14, says, at="start", size=12, fill=MARK)
    tiers = [("home", "durable, complete"), ("pinned", "page-locked RAM"), ("gpu", "device memory")]
    for x, (name, says) in zip(columns, tiers, strict=False):
        picture.room(x, lower, wide, name, says, PAPER, high)
    picture.room(columns[3], lower, wide, "Codec", "decodes on the device", HOME, high)
    for x in columns[:3]:
        picture.arrow((x + wide, lower + high // 2), (x + wide + space, lower + high // 2))

    asked, answered, gate = columns[3] + 50, columns[3] + wide - 50, columns[2] + wide // 2
    picture.arrow((asked, upper + high), (asked, turn), (gate, turn), (gate, lower - 36))
    picture.text(gate + 14, turn - 8, "cache miss", at="start", size=12, fill=MARK)
    picture.arrow((answered, lower), (answered, upper + high))
    picture.text(answered + 10, turn + 14, "decoded parts", at="start", size=12, fill=MARK)

    says = "Before a chunk ends, a hint starts the same way in the background, so most parts are in time."
    picture.text(columns[0], 326, says, at="start", fill=SOFT)
    return picture.svg()


def pictures() -> dict[Path, str]:
    """Each picture's file and content."""
    return {HERE / "house.svg": house(), HERE / "chunk.svg": chunk()}


if __name__ == "__main__":
    for file, content in pictures().items():
        file.write_text(content)
