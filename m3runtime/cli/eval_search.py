"""``m3 eval search``, ``floor`` and ``conversations``: what a search finds. They need no model, and no bank."""

from pathlib import Path
from typing import Annotated

import typer

from m3runtime.cli.evaluating import Out, References, Seed, finish, require_libraries
from m3runtime.cli.options import ConfigFile, Json, Set, configuration
from m3runtime.cli.progress import progress_bars
from m3runtime.errors import ConfigError


def search(
    config: ConfigFile = None,
    out: Out = Path("eval-search"),
    seed: Seed = 0,
    questions: Annotated[int, typer.Option("--questions", min=1, help="Most questions of each corpus.")] = 300,
    texts: Annotated[int, typer.Option("--texts", min=1, help="Most texts of each corpus.")] = 2000,
    k: Annotated[int, typer.Option("-k", min=1, help="Texts that one search may give.")] = 5,
    pairs: Annotated[
        list[Path] | None, typer.Option("--pairs", help="JSON lines with text and question; may be repeated.")
    ] = None,
    copies: Annotated[
        int, typer.Option("--copies", min=0, help="Search, too, where each text has so many copies.")
    ] = 0,
    only_pairs: Annotated[bool, typer.Option("--only-pairs", help="Search no corpora but those of --pairs.")] = False,
    set: Set = None,
    json: Json = False,
) -> None:
    """Compare search by embeddings, by words and by both: the right text among those found, and milliseconds.

    The corpora are invented facts, Python's manual and code, and yours. No model is needed, and no bank. With
    recall.reranker set, what was found is reranked as well.
    """
    settings = configuration(config, set)
    if only_pairs and not pairs:
        raise ConfigError("--only-pairs: name a file by --pairs")
    require_libraries()
    from m3runtime.lab.evaluation.finding import SearchSettings, evaluate_search

    asked = SearchSettings(seed, questions, texts, k, tuple(map(str, pairs or ())), copies, only_pairs)
    with progress_bars(shown=not json) as progress:
        report = evaluate_search(settings, asked, progress)
    finish(report, out, json=json)


def floor(
    config: ConfigFile = None,
    out: Out = Path("eval-floor"),
    seed: Seed = 0,
    questions: Annotated[int, typer.Option("--questions", min=1, help="Most questions of each kind.")] = 150,
    texts: Annotated[int, typer.Option("--texts", min=1, help="Most texts of each corpus.")] = 400,
    pairs: Annotated[
        list[Path] | None, typer.Option("--pairs", help="JSON lines with text and question; may be repeated.")
    ] = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Measure how well the nearest text's score tells whether a question can be answered, and floors for it.

    The corpora are those of m3 eval search. No model is needed, and no bank.
    """
    settings = configuration(config, set)
    require_libraries()
    from m3runtime.lab.evaluation.floor import FloorSettings, evaluate_floor

    asked = FloorSettings(seed, questions, texts, tuple(map(str, pairs or ())))
    with progress_bars(shown=not json) as progress:
        report = evaluate_floor(settings, asked, progress)
    finish(report, out, json=json)


def conversations(
    config: ConfigFile = None,
    out: Out = Path("eval-conversations"),
    seed: Seed = 0,
    references: References = 320,
    conversations: Annotated[int, typer.Option("--conversations", min=1, help="Number of conversations.")] = 100,
    k: Annotated[int, typer.Option("-k", min=1, help="Memories that one search may give.")] = 5,
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="Talk about JSON lines with text and question, not about facts.")
    ] = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Ask for invented facts in conversations with pronouns, ellipses and changes of subject.

    It tries values of recall.turn_weight, and needs no bank; a model only with recall.condense, to write the questions.
    """
    settings = configuration(config, set)
    require_libraries()
    from m3runtime.lab.evaluation.conversations import ConversationSettings, evaluate_conversations

    asked = ConversationSettings(seed, references, conversations, k, str(pairs or ""))
    with progress_bars(shown=not json) as progress:
        report = evaluate_conversations(settings, asked, progress)
    finish(report, out, json=json)
