"""``m3 plan``: size and cost of a bank before it is written."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3runtime.cli.codec import in_short
from m3runtime.cli.options import ConfigFile, Json, Set, configuration, parsed
from m3runtime.cli.terminal import print_json, say
from m3runtime.errors import ConfigError, InputError
from m3runtime.observe.figures import short, show_size

if TYPE_CHECKING:
    from m3runtime.memory.shape import ModelShape
    from m3runtime.planning.bank import Plan

_BYTES_OF_A_TOKEN = 4
"""Approximate bytes of a token of English text."""
_DIM_OF_BGE_M3 = 1024
"""Taken for an embedder that is not here to tell: that of the preset ``memory3``."""


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
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", min=1, help="Processes that write the bank, as of m3 write.")
    ] = 1,
    rate: Annotated[
        float | None,
        typer.Option("--rate", metavar="N", help="References a second that one of them writes; see m3 bench write."),
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(
            "--prices",
            metavar="NAME=N,...",
            help="Dollars for a home in an object store: put=0.005,get=0.0004 per 1,000 requests, month=0.023 per GB.",
        ),
    ] = None,
    embedding_dim: Annotated[
        int | None, typer.Option(min=1, help="Dimensions of an embedding. Default: the configured embedder's.")
    ] = None,
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
    from m3runtime.config.units import parse_count

    count = parsed("--references", parse_count, references)
    capacities = tuple(parsed("--capacity", _above_zero, text) for text in capacity or ())
    bandwidth = None if drive is None else parsed("--drive", _above_zero, drive.removesuffix("/s"))
    reads = None if iops is None else parsed("--iops", parse_count, iops)
    if speed is not None and not 0 < speed < float("inf"):
        raise InputError(f"--speed must be above 0, not {speed}")
    if speed is not None and bandwidth is None and reads is None:
        raise InputError("--speed tells how many streams a drive serves: give its limits with --drive or --iops")

    if rate is not None and not 0 < rate < float("inf"):
        raise InputError(f"--rate must be above 0, not {rate}")

    from m3runtime.planning import bank as planning
    from m3runtime.planning.drive import Drive
    from m3runtime.planning.store import Prices
    from m3runtime.planning.workers import Workers

    if chosen is None:
        settings, chosen = planning.sized(settings)
    dim = embedding_dim or planning.embedding_dim(settings)
    need = planning.Need(
        references=count,
        text_bytes=_BYTES_OF_A_TOKEN * settings.memory.reference_tokens if text_bytes is None else text_bytes,
        dim=dim or _DIM_OF_BGE_M3,
        capacities=capacities,
        drive=Drive(bandwidth, reads, speed),
        workers=Workers(workers, rate),
        prices=Prices(**_prices(prices)),
    )
    found = planning.plan(settings, chosen, need, name or settings.model.path)
    if json:
        print_json(found.to_json())
        return
    assumed = "" if dim else ", assumed; --embedding-dim sets it"
    for line in [*_memories(found), *_bank(found, need.text_bytes, f"{need.dim} dimensions each{assumed}")]:
        say(line)
    for line in [*_costs(found), *_reads(found), *_store(found)]:
        say(line)


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


def _prices(text: str | None) -> dict[str, float]:
    """The prices that --prices names, in dollars. Raises `InputError`."""
    found = dict[str, float]()
    for part in filter(None, (text or "").split(",")):
        name, _, value = part.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        if name not in ("put", "get", "month") or not 0 <= found[name] < float("inf"):
            raise InputError(f"--prices {part}: must be put=, get= or month= and dollars, such as get=0.0004")
    return found


def _above_zero(text: str) -> int:
    from m3runtime.config.units import parse_size

    size = parse_size(text)
    if not size:
        raise ValueError("must be above 0")
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
            f"{name:<48}{f'{size:,} B':>22}{short(memory.raw / size):>13}{show_size(size * found.references):>24}"
            for name, size in rows.items()
        ),
    ]


def _bank(found: "Plan", text_bytes: int, embeddings: str) -> list[str]:
    """Lines about the size of the bank and the tiers."""
    bank = found.bank
    tiers = [
        f"{room.tier} of {show_size(room.capacity)}: {room.memories:,} memories, "
        f"{short(100 * room.share)} % of the bank"
        for room in found.tiers
    ]
    return [
        "",
        f"bank: {show_size(bank.total)}: blocks {show_size(bank.blocks)}, texts {show_size(bank.texts)} "
        f"({text_bytes} bytes each), embeddings {show_size(bank.embeddings)} ({embeddings}), "
        f"codec {show_size(bank.codec)}",
        *(
            [f"its blocks are in int8, {show_size(found.beginning_block)} each: it is too small to train a codec on"]
            if found.beginning
            else []
        ),
        "not counted: the index, the internal structures of the home, and bias directions",
        *tiers,
    ]


def _costs(found: "Plan") -> list[str]:
    """Lines about FLOP, and about the number of uses at which each way is cheapest."""
    cost, tera = found.cost, 1e12
    over = "never" if cost.over_text is None else short(cost.over_text)
    return [
        "",
        f"memory: {short(cost.write / tera)} TFLOP to write, {short(cost.read / tera)} to read in a chunk "
        f"({found.memories} add {short(100 * cost.read_share)} % to a chunk's work)",
        f"text: {short(cost.text / tera)} TFLOP to read; parameters: {short(cost.train / tera)} to train on once",
        _work(found),
        f"memory is cheaper than text from {over} uses on, and than parameters up to {short(cost.under_parameters)}",
    ]


def _work(found: "Plan") -> str:
    """A line about writing the whole bank."""
    work, tera = found.work, 1e12
    whole = f"the whole bank: {short(work.flop / tera)} TFLOP to write"
    if work.workers > 1:
        whole += f", {short(work.flop_of_each / tera)} by each of {work.workers} workers"
    return whole if work.seconds is None else f"{whole}; {short(work.seconds / 3600)} hours"


def _store(found: "Plan") -> list[str]:
    """Lines about a home in an object store."""
    store = found.store
    if store is None:
        return []
    return [
        "",
        f"object store, to write the bank: {short(store.puts)} requests that write or list, {short(store.gets)} that "
        f"read: {_dollars(store.write)}; its room: {_dollars(store.month)} a month",
        f"a recall, nothing cached: {store.gets_of_a_recall} requests; a million recalls: {_dollars(store.recalls)}",
    ]


def _dollars(amount: float) -> str:
    return f"{amount:,.2f} dollars"


def _reads(found: "Plan") -> list[str]:
    reads = found.reads
    if reads is None:
        return []
    streams = "" if reads.streams is None else f"; streams: {short(reads.streams)}"
    return [
        "",
        f"drive, nothing cached: {short(reads.reads_per_s)} blocks of {show_size(reads.read_bytes)} a second, by its "
        f"{reads.limit}; {short(reads.recalls_per_s)} recalls of {found.memories}; "
        f"{short(reads.tokens_per_s)} tokens a second{streams}",
    ]
