"""``m3 codec``: trained codecs as separate files."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3runtime.cli.options import ConfigFile, Json, Set, TextField, configuration, documents_fields
from m3runtime.cli.progress import progress_bars
from m3runtime.cli.terminal import print_json, say
from m3runtime.errors import CodecError, InputError
from m3runtime.observe.figures import show_size

if TYPE_CHECKING:
    from m3runtime.codecs import Codec
    from m3runtime.memory.spec import MemorySpec

app = typer.Typer(
    name="codec",
    help="Train codecs by hand or anew, describe them, and exchange quantisers with faiss.",
    no_args_is_help=True,
)

Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]


@app.command()
def fit(
    corpus: Annotated[list[Path] | None, typer.Option("--corpus", help="Files or folders, as of `m3 write`.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file to make; default: `codec.file`.")] = None,
    config: ConfigFile = None,
    text_field: TextField = None,
    whole: Annotated[bool, typer.Option("--whole", help="Each document is one reference; do not split.")] = False,
    force: Force = False,
    set: Set = None,
    json: Json = False,
) -> None:
    """Train the configured codec on a sample of a corpus, and save it for `codec.file`.

    With `codec.file` a new bank has it from its first reference on, and does not begin with int8.
    """
    settings = configuration(config, set)
    if not corpus:
        raise InputError("say what to learn from: --corpus PATH, more than once for several")
    if (path := out or settings.codec.file) is None:
        raise InputError("say what file to make: --out FILE, or set `codec.file`")
    _check_free(path, force=force)
    from m3runtime.documents.reading import read_documents

    documents = read_documents(corpus, fields=documents_fields(settings, text_field))

    from m3runtime import assembly
    from m3runtime.documents.splitting import Splitter
    from m3runtime.documents.spool import ReferenceSpool
    from m3runtime.writing.fitting import fit_codec, sample

    adapter = assembly.open_adapter(settings)
    codec = assembly.make_codec(settings, adapter.spec)
    if codec.trained:
        raise InputError(f"a codec of kind {settings.codec.kind} learns nothing and cannot be fitted")
    splitter = Splitter(adapter.count_tokens, max_tokens=adapter.spec.reference_tokens)
    with closing(ReferenceSpool(documents, splitter, whole=whole)) as references:
        texts = [one.text for one in sample(references, settings.codec.sample_tokens, adapter.spec)]
    with progress_bars(shown=not json) as progress:
        fit_codec(codec, adapter, texts, settings.memory.batch_size, partial(progress, "Training the codec"))
    codec.save(path)
    _print(codec, path, json=json)


@app.command()
def refit(config: ConfigFile = None, set: Set = None, json: Json = False) -> None:
    """Train the bank's codec anew on what the bank holds now, and encode all memories by it, under new ids.

    It can be interrupted at any moment and run again: it goes on. Blocks of the former codec can be read until the last
    one is encoded anew. With `codec.file`, or another codec in the configuration, the bank gets that one.
    """
    settings = configuration(config, set)
    from m3runtime.writing import refitting

    with progress_bars(shown=not json) as progress:
        report = refitting.refit(settings, progress)
    if json:
        encoded = {str(old): new for old, new in report.encoded.items()}
        print_json({**asdict(report), "encoded": encoded, "bank": str(settings.bank)})
        return
    say(
        f"{len(report.encoded)} memories encoded anew by {report.codec} ({report.fingerprint[:16]}), "
        f"{report.left} left as they were: {settings.bank}"
    )
    if report.planned:
        say(
            f"the configured codec ({settings.codec.kind}) is trained once there are {settings.codec.sample_tokens} "
            "tokens of memories that it learns well; until then memories are stored in int8"
        )


@app.command()
def report(
    file: Annotated[Path | None, typer.Argument(help="A codec's file; default: the bank's.")] = None,
    config: ConfigFile = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Print the kind, the compression and the error of a codec; no model is needed."""
    if file is not None:
        from m3runtime.writing.codec_files import load_any

        _print(load_any(file), file, json=json)
        return
    settings = configuration(config, set)
    from m3runtime import assembly

    with closing(assembly.open_bank(settings, read_only=True)) as bank:
        path, codec = next(bank.codecs.files())
        _print(codec, path, json=json)


@app.command(name="import")
def import_(
    keys: Annotated[Path, typer.Option("--keys", help="An index of faiss, trained on keys.")],
    values: Annotated[Path, typer.Option("--values", help="An index of faiss, trained on values.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to make.")],
    bank: Annotated[bool, typer.Option("--bank", help="For memories as the bank has them; needs no model.")] = False,
    config: ConfigFile = None,
    force: Force = False,
    set: Set = None,
    json: Json = False,
) -> None:
    """Make a product codec from two faiss indexes, for memories of the configured model."""
    settings = configuration(config, set)
    _check_free(out, force=force, inputs={"--keys": keys, "--values": values})
    from m3runtime import assembly
    from m3runtime.codecs.product.faiss_exchange import from_faiss

    if bank:
        with closing(assembly.open_bank(settings, read_only=True)) as opened:
            spec = opened.manifest.spec
    else:
        with closing(assembly.open_adapter(settings)) as adapter:
            spec = adapter.spec
    codec = from_faiss(spec, keys, values)
    codec.save(out)
    _print(codec, out, json=json)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A codec's file.")],
    keys: Annotated[Path, typer.Option("--keys", help="The index to make for keys.")],
    values: Annotated[Path, typer.Option("--values", help="The index to make for values.")],
    force: Force = False,
    json: Json = False,
) -> None:
    """Export the quantisers of a codec as faiss indexes with the same codes, byte for byte."""
    _check_free(keys, force=force, inputs={"the codec": file})
    _check_free(values, force=force, inputs={"the codec": file, "--keys": keys})
    from m3runtime.codecs import files
    from m3runtime.codecs.product.codec import ProductCodec
    from m3runtime.writing.codec_files import load_any

    codec = load_any(file)
    if not isinstance(codec, ProductCodec):
        raise InputError(f"{file}: a codec of kind {codec.kind}; faiss has indexes for those of kind product alone")
    from m3runtime.codecs.product.faiss_exchange import to_faiss

    try:
        indexes = {keys: to_faiss(codec, "keys"), values: to_faiss(codec, "values")}
    except CodecError as error:
        raise InputError(f"{file}: {error}") from error
    import faiss

    written = {path: faiss.serialize_index(index).tobytes() for path, index in indexes.items()}
    for path, data in written.items():
        files.replace(path, data)
    if json:
        print_json({"file": str(file), "keys": str(keys), "values": str(values), "fingerprint": codec.fingerprint})
        return
    for path, data in written.items():
        say(f"{path}: {show_size(len(data))}")


def _check_free(path: Path, *, force: bool, inputs: Mapping[str, Path] | None = None) -> None:
    """Raise `InputError` unless a file can be made here: before anything is computed."""
    for name, other in (inputs or {}).items():
        if path.resolve() == other.resolve():
            raise InputError(f"{path}: cannot be both {name} and what is made")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; make it first")
    if path.exists() and not force:
        raise InputError(f"{path}: exists already; --force replaces it")


def _print(codec: "Codec", path: Path, *, json: bool) -> None:
    facts = _facts(codec, path)
    if json:
        print_json(facts)
        return
    facts["spec"] = in_short(codec.spec)
    facts["options"] = ", ".join(f"{name}: {value}" for name, value in codec.options.items()) or "none"
    fewer = facts.pop("times_fewer")
    measured = [facts.pop(name) for name in ("key_error", "value_error")]
    for name, value in facts.items():
        say(f"{name}: {show_size(value) if name.endswith('bytes') else value}")
    say(f"smaller than bfloat16: {fewer:.2f} times")
    for name, error in zip(("keys", "values"), measured, strict=True):
        say(f"relative squared error of {name}: {'not measured' if error is None else f'{error:.4g}'}")


def _facts(codec: "Codec", path: Path) -> dict[str, Any]:
    """The facts about a codec, as JSON values."""
    spec, reference = codec.spec, codec.payload_bytes(codec.spec.tokens)
    plain = 2 * spec.numbers(spec.tokens)  # of two bytes each
    return {
        "file": str(path),
        "kind": codec.kind,
        "options": dict(codec.options),
        "spec": spec.to_json(),
        "fingerprint": codec.fingerprint,
        "file_bytes": path.stat().st_size,
        # Of one more token: what stands once in a memory is in the bytes of a reference.
        "token_bytes": reference - codec.payload_bytes(spec.tokens - 1) if spec.tokens > 1 else reference,
        "reference_bytes": reference,
        "times_fewer": plain / reference,
        "key_error": None if codec.measured is None else codec.measured.keys,
        "value_error": None if codec.measured is None else codec.measured.values,
    }


def in_short(spec: "MemorySpec") -> str:
    """A spec for people, on one line."""
    layers = spec.layers
    run = layers == tuple(range(layers[0], layers[-1] + 1)) and len(layers) > 1
    named = f"{layers[0]}-{layers[-1]}" if run else ", ".join(map(str, layers))
    kept = "all" if spec.dense else f"{spec.tokens} of"
    if spec.budgets:
        mean = spec.numbers(spec.tokens) / spec.numbers_per_token
        kept = f"up to {spec.tokens}, on average {mean:.1f}, of"
    return (
        f"layers {named}; {'up to ' if spec.heads else ''}{spec.kv_heads} heads of {spec.head_dim}; "
        f"{kept} {spec.reference_tokens} tokens of a reference; computed in {spec.dtype}"
    )
