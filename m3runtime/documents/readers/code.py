"""Source code: plain text in a Markdown fence, so that no comment is taken for a heading."""

from collections.abc import Iterator
from pathlib import Path

from m3runtime.documents.parts import Part
from m3runtime.documents.readers import plain

LANGUAGES = {
    ".py": "python", ".pyi": "python", ".js": "javascript", ".mjs": "javascript", ".jsx": "jsx", ".ts": "typescript",
    ".tsx": "tsx", ".c": "c", ".h": "c", ".cpp": "cpp", ".cc": "cpp", ".cxx": "cpp", ".hpp": "cpp", ".cs": "csharp",
    ".cu": "cuda", ".css": "css", ".dart": "dart", ".ex": "elixir", ".exs": "elixir", ".go": "go", ".hs": "haskell",
    ".ini": "ini", ".java": "java", ".jl": "julia", ".json": "json", ".kt": "kotlin", ".lua": "lua", ".ml": "ocaml",
    ".php": "php", ".pl": "perl", ".proto": "protobuf", ".r": "r", ".rb": "ruby", ".rs": "rust", ".scala": "scala",
    ".sh": "bash", ".sql": "sql", ".swift": "swift", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".zig": "zig",
}  # fmt: skip
"""The name of each suffix's language."""
FENCE = "````"
"""Longer than the fences that code may hold in its own texts."""


def read(path: Path) -> Iterator[Part]:
    """The code between two fences, the first with the language; an empty file has none."""
    pieces = (piece for piece in plain.read(path) if piece.text)
    if (first := next(pieces, None)) is not None:
        yield Part(f"{FENCE}{LANGUAGES.get(path.suffix.lower(), '')}\n")
        yield first
        yield from pieces
        yield Part(f"\n{FENCE}\n")
