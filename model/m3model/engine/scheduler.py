"""`Scheduler`: which rows read and decode in the next step. Plain Python: it knows neither tensors nor text.

A sequence reads the tokens of its prompt in chunks and then decodes; before each chunk it recalls (DESIGN: every 64
tokens). Token ``i`` of prompt and answer together begins a chunk of the prompt if ``i`` is a multiple of the chunk's
size; answers recall after each so many tokens, before the last of those is read, or after several times so many.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

STEP_TOKENS = 64
"""Most tokens that a row reads in a step,"""
ALONE_TOKENS = 512
"""and most where nobody decodes and nobody recalls."""


@dataclass(eq=False, slots=True)
class Scheduled:
    """One sequence on its way through the engine."""

    prompt: Sequence[int]
    limit: int
    """Most tokens of the answer."""
    chunk: int | None
    """Tokens of a chunk; None for a sequence that recalls nothing."""
    every: int = 1
    """Chunks of the answer from one recall to the next; 0: the answer recalls nothing."""
    answer: list[int] = field(default_factory=list)
    """Its tokens, as far as they are known on the host."""
    row: int | None = None
    read: int = 0
    """Tokens of prompt and answer whose keys and values are in the row."""
    drawn: int = 0
    """Tokens of the answer that steps have drawn; those of the step under way are not known yet."""
    recalled: int = -1
    """The place (a number of tokens read) of its last recall."""
    recalling: bool = False
    ended: bool = False

    @property
    def total(self) -> int:
        """Tokens of prompt and answer that are drawn."""
        return len(self.prompt) + self.drawn

    @property
    def decodes(self) -> bool:
        """Is only the token that was drawn last still to be read?"""
        return self.drawn > 0 and self.read == self.total - 1

    @property
    def period(self) -> int | None:
        """Tokens of the answer from one recall to the next; None if the answer recalls nothing."""
        return self.chunk * self.every if self.chunk and self.every else None

    @property
    def due(self) -> bool:
        """Must it recall before it reads on?"""
        return not self.recalling and self.recalled != self.read and self._begins_chunk(self.read)

    def tokens(self, start: int, end: int) -> list[int]:
        """The tokens of prompt and answer between two places."""
        prompt = len(self.prompt)
        return [*self.prompt[start:end], *self.answer[max(0, start - prompt) : max(0, end - prompt)]]

    def chunk_tokens(self) -> Sequence[int]:
        """The tokens that it recalls by now: the prompt's next chunk, or the answer's last one."""
        assert self.chunk
        if self.read < len(self.prompt):
            return self.prompt[self.read : self.read + self.chunk]
        end = self.read - len(self.prompt) + 1
        return self.answer[end - self.chunk : end]

    def next_stop(self) -> int:
        """The place up to which it can read before it must recall again."""
        if self.chunk is None:
            return self.total
        prompt = len(self.prompt)
        ahead = (self.read // self.chunk + 1) * self.chunk
        if ahead >= prompt:
            if self.period is None:
                return self.total
            answered = max(0, self.read + 1 - prompt)
            ahead = prompt - 1 + (answered // self.period + 1) * self.period
        return min(ahead, self.total)

    def _begins_chunk(self, place: int) -> bool:
        if self.chunk is None:
            return False
        if place < len(self.prompt):
            return place % self.chunk == 0
        return self.period is not None and (place - len(self.prompt) + 1) % self.period == 0


@dataclass(frozen=True, slots=True)
class Reading:
    """A sequence that reads several tokens in a step."""

    sequence: Scheduled
    start: int
    end: int

    @property
    def draws(self) -> bool:
        """Does the step draw the token after them? Otherwise there are more to read."""
        return self.end == self.sequence.total


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one step."""

    decoding: tuple[Scheduled, ...]
    reading: tuple[Reading, ...]

    @property
    def sequences(self) -> Iterator[Scheduled]:
        """Those that a token is drawn for, in the order of the step's results."""
        yield from self.decoding
        yield from (one.sequence for one in self.reading if one.draws)


class Scheduler:
    """Gives rows to sequences, oldest first. Not thread-safe."""

    def __init__(self, rows: int, fits: Callable[[int, int], bool]) -> None:
        """``fits(rows, tokens)``: is there room for so many rows of so many tokens of context?"""
        self._rows = rows
        self._fits = fits
        self.waiting: deque[Scheduled] = deque()
        self.running: list[Scheduled] = []
        """Those that have a row, oldest first."""
        self.preempted = 0
        """How often a sequence had to give its row back."""

    def add(self, sequence: Scheduled) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def admit(self) -> list[Scheduled]:
        """Give free rows to waiting sequences, in their order; returns those that got one."""
        admitted = []
        while self.waiting and len(self.running) < self._rows:
            first = self.waiting[0]
            # All of it, and the token that it draws next: or it would be the first to be preempted.
            if self.running and not self._fits(len(self.running) + 1, max(first.total + 1, self.tokens)):
                break
            taken = {one.row for one in self.running}
            first.row = next(row for row in range(self._rows) if row not in taken)
            self.running.append(self.waiting.popleft())
            admitted.append(first)
        return admitted

    def due(self) -> list[Scheduled]:
        """The sequences that must recall now, and whose tokens are known."""
        return [one for one in self.running if one.due and len(one.answer) == one.drawn < one.limit]

    def plan(self, *, most_reading: int) -> Plan:
        """The next step: all that decode, and of those that read one beside them, or else the first ``most_reading``.

        Sequences that recall, or must, are left out. Where a context has no room any more, the youngest sequence loses
        its row: it waits, before all others, until there is room, and is read again.
        """
        self._make_room()
        ready = [one for one in self.running if not one.recalling and not one.due and one.drawn < one.limit]
        decoding = tuple(one for one in ready if one.decodes)
        readers = [one for one in ready if not one.decodes and len(one.answer) == one.drawn]
        together = 1 if decoding else most_reading
        size = STEP_TOKENS if decoding or any(one.chunk for one in readers) else ALONE_TOKENS
        reading = (Reading(one, one.read, min(one.next_stop(), one.read + size)) for one in readers[:together])
        return Plan(decoding, tuple(reading))

    def launched(self, plan: Plan) -> None:
        """Note that a step reads what was planned and draws a token for each of `Plan.sequences`."""
        drawing = list(plan.sequences)
        for one in plan.decoding:
            one.read += 1
        for part in plan.reading:
            part.sequence.read = part.end
        for one in drawing:
            one.drawn += 1

    def end(self, sequence: Scheduled) -> None:
        """Take a sequence out, wherever it is."""
        sequence.ended = True
        if sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            sequence.row = None

    def compact(self) -> list[tuple[int, int]]:
        """Move rows down into free ones, so that the rows in use are the first; returns ``(from, to)`` in order."""
        moves = []
        while self.running and (last := max(self.running, key=lambda one: one.row or 0)).row != len(self.running) - 1:
            assert last.row is not None
            free = min(set(range(len(self.running))) - {one.row for one in self.running})
            moves.append((last.row, free))
            last.row = free
        return moves

    @property
    def tokens(self) -> int:
        """Tokens of context that the longest row needs after its next step."""
        return max((max(one.read + 1, one.total) for one in self.running), default=0)

    def _make_room(self) -> None:
        while len(self.running) > 1 and not self._fits(len(self.running), self.tokens):
            idle = [one for one in self.running if not one.recalling and len(one.answer) == one.drawn]
            if not idle:
                return  # the step under way, or a recall, ends first
            youngest = idle[-1]
            self.running.remove(youngest)
            youngest.row, youngest.read, youngest.recalled = None, 0, -1
            self.waiting.appendleft(youngest)
            self.preempted += 1
