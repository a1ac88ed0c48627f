"""``m3 eval calibrate``: the likelihood of answers from a bank, by the number of recalled memories."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Reference
from m3runtime.errors import InputError
from m3runtime.lab.evaluation.choosing import MEMORIES, Case, Pair, Setting, grid
from m3runtime.lab.evaluation.journal import Journal, silent
from m3runtime.lab.evaluation.laboratory import Laboratory, weighted
from m3runtime.lab.evaluation.statements import FEWEST, Statement, Statements, holds, make_statements
from m3runtime.memory.block import as_ids
from m3runtime.memory.spec import fingerprint
from m3runtime.retrieval.match import Match
from m3runtime.runtime import Runtime
from m3runtime.writing.writer import OnProgress

_SPARE = 8
"""Memories to search for beyond the most that can be recalled, because some may contain the statement."""


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """The settings of ``m3 eval calibrate``."""

    seed: int = 0
    statements: int = 64
    batch: int = 8
    """Answers in one batch."""

    @property
    def command(self) -> str:
        """The command that has these settings."""
        return f"m3 eval calibrate --seed {self.seed} --statements {self.statements}"


@dataclass(frozen=True, slots=True)
class CalibrationResults:
    """The results of ``m3 eval calibrate``."""

    statements: Statements
    pairs: tuple[Pair, ...]
    """One for each statement."""
    settings: tuple[Setting, ...]
    """Settings to choose from, with ``former`` among them."""
    former: Setting
    """The setting of the configuration."""
    fingerprints: dict[str, str]
    """Fingerprints of everything that the bank was made with, by name."""


@dataclass(frozen=True, slots=True)
class _Task:
    """The answer of a statement to score, with some memories recalled."""

    key: str
    statement: Statement
    recalled: tuple[Match, ...]
    tokens: int
    """Tokens of the memories."""


def setting_of(config: Config) -> Setting:
    """The setting of a configuration."""
    recall = config.recall
    return Setting(recall.memories, recall.min_score, recall.margin)


def calibrate(
    config: Config,
    settings: CalibrationSettings,
    folder: Path,
    open_adapter: Callable[[], Adapter],
    progress: OnProgress = silent,
) -> CalibrationResults:
    """Score the answers of statements from the configured bank, which is not changed.

    It can be stopped at any moment and called again: answers in the folder's journal are not scored again.
    ``open_adapter`` is called only if the bank is usable.

    Raises `InputError` if the bank gives too few statements.
    """
    if settings.statements < FEWEST:
        raise InputError(f"statements: at least {FEWEST} are needed, or nothing can be told")
    former = setting_of(config)
    with Runtime.open(config.without_cold_start(), read_only=True) as runtime:
        statements = make_statements(runtime.bank.home, settings.statements, settings.seed)
        cases = _cases(runtime, statements.made, max(*MEMORIES, former.memories))
        choices = tuple(grid((nearest for both in cases for nearest in both), former))
        adapter = open_adapter()
        adapter.check(runtime.bank.manifest, runtime.bank.path)
        scorer = _Scorer(adapter, runtime, {match.id for both in cases for nearest in both for match in nearest})
        wanted = [tuple({setting.recalled(nearest) for setting in choices} | {0} for nearest in both) for both in cases]
        tasks = {
            task.key: task
            for statement, both, counts in zip(statements.made, cases, wanted, strict=True)
            for nearest, some in zip(both, counts, strict=True)
            for task in scorer.tasks(statement, nearest, some)
        }
        with Journal(folder / "scores.jsonl", _depends_on(runtime, adapter, statements.made, cases)) as journal:
            scorer.score(tuple(tasks.values()), settings.batch, journal, progress)
            done = dict(journal.done)
        pairs = tuple(
            Pair(
                *(
                    Case(nearest, {count: fmean(done[_key(statement, nearest[:count])]) for count in sorted(some)})
                    for nearest, some in zip(both, counts, strict=True)
                )
            )
            for statement, both, counts in zip(statements.made, cases, wanted, strict=True)
        )
        return CalibrationResults(statements, pairs, choices, former, runtime.bank.manifest.fingerprints())


Nearest = tuple[Match, ...]


def _cases(runtime: Runtime, statements: Sequence[Statement], deepest: int) -> list[tuple[Nearest, Nearest]]:
    """The nearest memories of each statement: among all, and among those that do not contain it."""
    cases = []
    found = runtime.search([statement.prompt for statement in statements], deepest + _SPARE)
    for statement, matches in zip(statements, found, strict=True):
        references = runtime.references([match.id for match in matches])
        there = [(match, one) for match, one in zip(matches, references, strict=True) if one is not None]
        unknown = [match for match, one in there if not holds(one.text, statement)]
        cases.append((tuple(match for match, _ in there[:deepest]), tuple(unknown[:deepest])))
    return cases


class _Scorer:
    """Scores answers with memories of one bank."""

    def __init__(self, adapter: Adapter, runtime: Runtime, ids: set[int]) -> None:
        self.adapter = adapter
        self.runtime = runtime
        self.references: Mapping[int, Reference] = {
            id: one for id, one in zip(sorted(ids), runtime.references(sorted(ids)), strict=True) if one is not None
        }

    def tasks(self, statement: Statement, nearest: Nearest, counts: set[int]) -> Iterator[_Task]:
        """A task for each number of memories."""
        for count in sorted(counts):
            recalled = nearest[:count]
            tokens = sum(self.references[match.id].tokens for match in recalled)
            yield _Task(_key(statement, recalled), statement, recalled, tokens)

    def score(self, tasks: Sequence[_Task], size: int, journal: Journal, progress: OnProgress) -> None:
        """Score the tasks that the journal lacks."""
        ordered = sorted(tasks, key=lambda task: (task.tokens, task.key))  # so that little is padded
        journal.fill(ordered, size, lambda task: task.key, self._score, partial(progress, "Scoring answers"))

    def _score(self, tasks: Sequence[_Task]) -> list[list[float]]:
        ids = dict.fromkeys(match.id for task in tasks for match in task.recalled)
        parts = self.runtime.fetch(as_ids(list(ids)), self.adapter.dtype)
        choices = {}
        for task in tasks:
            there = [match for match in task.recalled if match.id in parts]  # as in serving, bad blocks are left out
            choices[task.key] = weighted(there, self.runtime.config.recall.score_temperature)
        laboratory = Laboratory(self.runtime.config, self.adapter.spec, parts, self.references, choices)
        # The key stands for the query: one statement is in a batch several times, with other memories each time.
        prompts = [Prompt(task.statement.prompt, query=task.key) for task in tasks]
        with ExitStack() as closing:
            streams = [closing.enter_context(laboratory.stream(self.adapter.dtype)) for _ in tasks]
            scores = self.adapter.score(prompts, [task.statement.answer for task in tasks], streams)
        return [list(score.log_probs) for score in scores]


def _key(statement: Statement, recalled: Sequence[Match]) -> str:
    return f"{statement.reference}/{','.join(str(match.id) for match in recalled)}"


def _depends_on(
    runtime: Runtime, adapter: Adapter, statements: Sequence[Statement], cases: Sequence[tuple[Nearest, Nearest]]
) -> str:
    """A fingerprint of everything that scores depend on, without the values to choose, so that a second run is fast."""
    config = runtime.config
    return fingerprint(
        {
            "model": [adapter.model_fingerprint, adapter.tokenizer_fingerprint, str(adapter.dtype)],
            "memory": config.memory.model_dump(mode="json", exclude={"batch_size"}),
            "recall": [config.recall.chunk_tokens, config.recall.score_temperature],
            "bank": [runtime.bank.stamp.bank, runtime.bank.manifest.embedder],
            "statements": [asdict(statement) for statement in statements],
            "nearest": [[[asdict(match) for match in nearest[: max(MEMORIES)]] for nearest in both] for both in cases],
        }
    )
