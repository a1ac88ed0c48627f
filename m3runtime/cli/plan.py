"""``m3 plan``: size and cost of a bank before it is written."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3runtime.cli.codec import in_short
from m3runtime.cli.options import ConfigFile, Json, Set, configuration, print_json
from m3runtime.errors import ConfigError, InputError

if TYPE_CHECKING:
    from m3runtime.memory.shape import ModelShape
    from m3runtime.planning.bank import Plan

_BYTES_OF_A_TOKEN = 4
"""Approximate bytes of a token of English text."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def plan(
    config: ConfigFile = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Name of a known shape instead of the configured model: memory3-2.4b.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="NAME=N,...",
            help="A shape instead of the configured model's, or changes to --model: layers=30,hidden=576,heads=9,"
            "kv_heads=3,head_dim=64,mlp=1536,vocabulary=49152,gated=true.",
        ),
    ] = None,
    references: Annotated[
        str, typer.Option("--references", "-n", metavar="N", help="Number of references in the bank, such as 1e8.")
    ] = "1e6",
    capacity: Annotated[
        list[str] | None,
        typer.Option("--capacity", metavar="SIZE", help="Capacity of a further tier; may be repeated."),
    ] = None,
    drive: Annotated[
        str | None, typer.Option("--drive", metavar="SIZE", help="Bytes that the drive reads per second, such as 3GiB.")
    ] = None,
    iops: Annotated[
        str | None, typer.Option("--iops", metavar="N", help="Reads per second of the drive, such as 5e5.")
    ] = None,
    speed: Annotated[
        float | None, typer.Option("--speed", metavar="N", help="Tokens per second that one stream decodes.")
    ] = None,
    embedding_dim: Annotated[int, typer.Option(min=1, help="Dimensions of an embedding; BGE-M3 has 1024.")] = 1024,
    text_bytes: Annotated[
        int | None, typer.Option(min=0, help="Bytes of the text of a reference. Default: four per token.")
    ] = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Compute the size and the cost of a bank, and what its tiers and drive allow, before it is written.

    No weights are read, and nothing is timed. With --model or --shape, only a file that --config names is read;
    memories are then those of `memory.preset: memory3`, unless --set says otherwise.
    """
    chosen = _chosen(model, shape)
    name = model or ("a model of that shape" if chosen else "")
    if chosen is None or config is not None:
        settings = configuration(config, set)
    else:
        alone = ["bank=.", f"model.path={name}", f"model.dtype={chosen.dtype}", "memory.preset=memory3"]
        settings = configuration(Path(os.devnull), [*alone, "embedder.path=BAAI/bge-m3", *(set or ())])
    count = _count("--references", references)
    capacities = tuple(_size("--capacity", text) for text in capacity or ())
    bandwidth = None if drive is None else _size("--drive", drive.removesuffix("/s"))
    reads = None if iops is None else _count("--iops", iops)
    if speed is not None and not 0 < speed < float("inf"):
        raise InputError(f"--speed must be above 0, not {speed}")
    if speed is not None and bandwidth is None and reads is None:
        raise InputError("--speed tells how many streams a drive serves: give its limits with --drive or --iops")

    from m3runtime.planning import bank as planning
    from m3runtime.planning.drive import Drive

    if chosen is None:
        settings, chosen = planning.sized(settings)
    need = planning.Need(
        references=count,
        text_bytes=_BYTES_OF_A_TOKEN * settings.memory.reference_tokens if text_bytes is None else text_bytes,
        dim=embedding_dim,
        capacities=capacities,
        drive=Drive(bandwidth, reads, speed),
    )
    found = planning.plan(settings, chosen, need, name or settings.model.path)
    if json:
        print_json(found.to_json())
        return
    for line in [*_memories(found), *_bank(found, need.text_bytes, need.dim), *_costs(found), *_reads(found)]:
        typer.echo(line)


def _chosen(model: str | None, shape: str | None) -> "ModelShape | None":
    """The shape that --model and --shape select, or None. Raises `InputError`."""
    from m3runtime.memory.shape import MODELS, described

    if model is not None and model not in MODELS:
        raise InputError(
            f"--model {model} is not known; known are {', '.join(MODELS)}. "
            "Describe a shape with --shape, or configure the model as model.path"
        )
    base = None if model is None else MODELS[model]
    if shape is None:
        return base
    try:
        return described(shape, base)
    except ConfigError as error:
        raise InputError(f"--shape: {error}") from None


def _count(option: str, text: str) -> int:
    from m3runtime.config.units import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise InputError(f"{option} {error}") from None


def _size(option: str, text: str) -> int:
    from m3runtime.config.units import parse_size

    try:
        size = parse_size(text)
    except ValueError as error:
        raise InputError(f"{option} {error}") from None
    if not size:
        raise InputError(f"{option} must be above 0")
    return size


def _memories(found: "Plan") -> list[str]:
    """Lines about the model, the spec and the size of a memory after each step."""
    shape, memory = found.shape, found.memory
    options = ", ".join(f"{name}: {value}" for name, value in found.codec.items() if name != "kind")
    rows = {
        "every layer, query head and token in bfloat16": memory.raw,
        "every layer, KV head and token in bfloat16": memory.cache,
        "kept by the spec, in bfloat16": memory.kept,
        "encoded by the codec": memory.payload,
        "a block: encoded, with its header": memory.block,
    }
    return [
        f"{found.model}: {shape.layers} layers of {shape.hidden} channels, {shape.heads} query heads and "
        f"{shape.kv_heads} KV heads of {shape.head_dim}, {'gated' if shape.gated else 'plain'} MLP of {shape.mlp}, "
        f"vocabulary {shape.vocabulary:,}",
        f"memories: {in_short(found.spec)}",
        f"codec: {found.codec['kind']}{f' ({options})' if options else ''}",
        "",
        f"{'':<48}{'one memory':>22}{'times fewer':>13}{f'{found.references:,} of them':>24}",
        *(
            f"{name:<48}{f'{size:,} B':>22}{_three(memory.raw / size):>13}{_bytes(size * found.references):>24}"
            for name, size in rows.items()
        ),
    ]


def _bank(found: "Plan", text_bytes: int, dim: int) -> list[str]:
    """Lines about the size of the bank and the tiers."""
    bank = found.bank
    tiers = [
        f"{room.tier} of {_bytes(room.capacity)}: {room.memories:,} memories, {_three(100 * room.share)} % of the bank"
        for room in found.tiers
    ]
    return [
        "",
        f"bank: {_bytes(bank.total)}: blocks {_bytes(bank.blocks)}, texts {_bytes(bank.texts)} ({text_bytes} bytes "
        f"each), embeddings {_bytes(bank.embeddings)} ({dim} numbers each)",
        "not counted: the index, and the internal structures of the home",
        *tiers,
    ]


def _costs(found: "Plan") -> list[str]:
    """Lines about FLOP, and about the number of uses at which each way is cheapest."""
    cost, tera = found.cost, 1e12
    over = "never" if cost.over_text is None else _three(cost.over_text)
    return [
        "",
        f"memory: {_three(cost.write / tera)} TFLOP to write, {_three(cost.read / tera)} to read in a chunk "
        f"({found.memories} add {_three(100 * cost.read_share)} % to a chunk's work)",
        f"text: {_three(cost.text / tera)} TFLOP to read; parameters: {_three(cost.train / tera)} to train on once",
        f"the whole bank: {_three(cost.write * found.references / tera)} TFLOP to write",
        f"memory is cheaper than text from {over} uses on, and than parameters up to {_three(cost.under_parameters)}",
    ]


def _reads(found: "Plan") -> list[str]:
    reads = found.reads
    if reads is None:
        return []
    streams = "" if reads.streams is None else f"; streams: {_three(reads.streams)}"
    return [
        "",
        f"drive, nothing cached: {_three(reads.reads_per_s)} blocks of {_bytes(reads.read_bytes)} a second, by its "
        f"{reads.limit}; {_three(reads.recalls_per_s)} recalls of {found.memories}; "
        f"{_three(reads.tokens_per_s)} tokens a second{streams}",
    ]


def _three(number: float) -> str:
    """A number with three significant digits."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def _bytes(size: float) -> str:
    """A size with three significant digits. Units are powers of 1024, which the paper calls PB and TB."""
    power = 0
    while float(f"{size:.3g}") >= 1000 and power < len(_UNITS) - 1:
        size, power = size / 1024, power + 1
    return f"{_three(size)} {_UNITS[power]}"
