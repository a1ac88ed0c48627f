"""`EngineContract`: the laws of every `Engine`.

No law waits on a clock: requests arrive and leave at the tokens of others.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3runtime.adapters.answers import Answer, Prompt
from m3runtime.adapters.engine import End, Engine, Event, Failure, Piece, Read, Request, Ticket, answers
from m3runtime.errors import EngineClosedError, InputError

__all__ = ["EngineContract", "Seen"]


@dataclass(slots=True)
class Seen:
    """The events that were heard of one request."""

    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def last(self) -> Event:
        """Its last event, once it came."""
        assert self.ended.wait(60), "no last event came"
        return self.events[-1]

    @property
    def answer(self) -> Answer:
        """Its answer."""
        assert isinstance(self.last, End), self.last
        return self.last.answer

    def check(self) -> None:
        """The laws of what one request is told."""
        answer = self.answer
        assert [isinstance(event, End | Failure) for event in self.events].count(True) == 1
        pieces = [event for event in self.events if isinstance(event, Piece)]
        assert "".join(piece.text for piece in pieces) == answer.text
        assert tuple(token for piece in pieces for token in piece.tokens) == answer.tokens
        assert tuple(one for piece in pieces for one in piece.log_probs) == answer.log_probs
        assert tuple(event.recalled for event in self.events if isinstance(event, Read)) == answer.chunks


class Crowd:
    """Submits requests when so many tokens were heard in all, and cancels them after so many of their own."""

    def __init__(self, engine: Engine, requests: Sequence[Request], arrivals: Sequence[int], leaves: Sequence[Any]):
        self.seen = [Seen() for _ in requests]
        self._engine = engine
        self._requests = requests
        self._leaves = leaves
        self._waiting = sorted(range(len(requests)), key=lambda index: (arrivals[index], index))
        self._arrivals = arrivals
        self._tickets: dict[int, Ticket] = {}
        self._heard = self._ended = 0
        self._submit()

    def _submit(self) -> None:
        """Submit all whose time has come; nobody is left to wait for, and the next one comes at once."""
        due = [index for index in self._waiting if self._arrivals[index] <= self._heard]
        if not due and self._waiting and self._ended == len(self._requests) - len(self._waiting):
            due = self._waiting[:1]
        if due:
            self._waiting = [index for index in self._waiting if index not in due]
            tickets = self._engine.submit([self._requests[i] for i in due], lambda n, event: self._hear(due[n], event))
            self._tickets |= dict(zip(due, tickets, strict=True))

    def _hear(self, index: int, event: Event) -> None:
        seen = self.seen[index]
        seen.events.append(event)
        if isinstance(event, Piece):
            self._heard += len(event.tokens)
            own = sum(len(one.tokens) for one in seen.events if isinstance(one, Piece))
            if self._leaves[index] is not None and own >= self._leaves[index] and index in self._tickets:
                self._tickets[index].cancel()
        if isinstance(event, End | Failure):
            self._ended += 1
        self._submit()
        if isinstance(event, End | Failure):
            seen.ended.set()


class EngineContract:
    """The laws of `Engine`. Subclass it as ``TestMyEngine``, and make the engine and its requests."""

    examples: ClassVar[int] = 12
    """Examples of each property: engines are slow."""

    def make_engine(self, *, rows: int = 4, crowded: bool = False) -> Engine:
        """An engine with so many rows; ``crowded``: with room for a part of what its rows will need."""
        raise NotImplementedError

    def make_requests(self) -> list[Request]:
        """Requests that differ, at least six, each time with streams of their own.

        With memories and without, greedy and drawn, of less than a chunk and of several, with log-probabilities,
        penalties and a ``recall_every`` among them; the first one reads memories and writes more than two chunks. No
        answer depends on what is late.
        """
        raise NotImplementedError

    def make_failing_request(self) -> Request:
        """A request whose recalls raise an error."""
        raise NotImplementedError

    def make_late_request(self, gate: threading.Event) -> Request:
        """A request whose recalls wait for the gate."""
        raise NotImplementedError

    def alone(self) -> list[Answer]:
        """The answer to each of `make_requests` by an engine that has nothing else to do."""
        engine = self.make_engine()
        found = [answers(engine, [request])[0] for request in self.make_requests()]
        engine.close()
        return found

    def check(self, crowd: Sequence[Seen], expected: Sequence[Answer]) -> None:
        """Everybody got what they get alone, as far as they wanted it."""
        for seen, alone in zip(crowd, expected, strict=True):
            seen.check()
            answer = seen.answer
            assert answer.tokens == alone.tokens[: len(answer.tokens)]
            assert [chunk.ids for chunk in answer.chunks] == [c.ids for c in alone.chunks[: len(answer.chunks)]]
            if answer.stopped_by != "cancel":
                assert (answer.tokens, answer.text) == (alone.tokens, alone.text)
                assert answer.stopped_by == alone.stopped_by
                assert [one.token for one in answer.log_probs] == [one.token for one in alone.log_probs]
                assert [one.log_prob for one in answer.log_probs] == pytest.approx(
                    [one.log_prob for one in alone.log_probs], abs=1e-3
                )
                self.check_grounding(answer, alone)

    def check_grounding(self, answer: Answer, alone: Answer) -> None:
        """Each token was read from the same memories, as much."""
        if alone.grounding is None:
            assert answer.grounding is None
            return
        assert answer.grounding is not None
        assert answer.grounding.ends == alone.grounding.ends
        assert len(answer.grounding.shares) == len(answer.tokens)
        for found, expected in zip(answer.grounding.shares, alone.grounding.shares, strict=True):
            assert found == pytest.approx(expected, abs=1e-3)

    def test_batch_law(self) -> None:
        """A request gets the same tokens alone and beside any others, whenever they come and go."""
        expected = self.alone()
        count = len(expected)
        arrivals = st.lists(st.integers(0, 30), min_size=count, max_size=count)
        leaves = st.lists(st.none() | st.integers(1, 12), min_size=count, max_size=count)
        engines = {(rows, crowded): self.make_engine(rows=rows, crowded=crowded) for rows in (2, 4, count)
                   for crowded in (False, True)}  # fmt: skip

        @settings(max_examples=self.examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(st.sampled_from(sorted(engines)), arrivals, leaves)
        def law(kind: tuple[int, bool], arrivals: list[int], leaves: list[int | None]) -> None:
            self.check(Crowd(engines[kind], self.make_requests(), arrivals, leaves).seen, expected)

        law()
        for engine in engines.values():
            engine.close()

    def test_a_submission_is_queued_as_a_whole_or_not_at_all(self) -> None:
        engine, (first, *_) = self.make_engine(), self.make_requests()
        heard: list[Event] = []
        with pytest.raises(InputError, match="at least one token"):
            engine.submit([first, replace(first, prompt=Prompt(""))], lambda _, event: heard.append(event))
        expected = self.alone()[0]
        assert answers(engine, [first])[0].tokens == expected.tokens
        assert heard == []
        engine.close()

    @pytest.mark.parametrize("every", [0, 1, 2])
    def test_an_answer_recalls_as_often_as_it_asks_for(self, every: int) -> None:
        """And has the same tokens up to the first recall that it leaves out."""
        engine = self.make_engine()
        usual, request = [replace(self.make_requests()[0], recall_every=often) for often in (1, every)]
        assert usual.stream
        chunk = usual.stream.runtime.config.recall.chunk_tokens
        heard = [Crowd(engine, [one], [0], [None]).seen[0] for one in (usual, request)]
        for seen in heard:
            seen.check()
        expected, places = [[event.tokens for event in one.events if isinstance(event, Read)] for one in heard]
        assert max(expected) >= 2 * chunk
        assert places == [place for place in expected if not place or (every and place // chunk % every == 0)]
        same = min({*expected} - {*places}, default=None)
        assert heard[0].answer.tokens[:same] == heard[1].answer.tokens[:same]
        engine.close()

    def test_whoever_cancels_keeps_what_was_written(self) -> None:
        engine, requests = self.make_engine(), self.make_requests()
        crowd = Crowd(engine, requests[:1], [0], [2])
        answer = crowd.seen[0].answer
        assert answer.stopped_by == "cancel"
        assert len(answer.tokens) >= 2
        crowd.seen[0].check()
        crowd._tickets[0].cancel()  # after the end
        engine.close()

    def test_an_error_ends_the_request_that_has_it(self) -> None:
        engine, requests = self.make_engine(rows=8), self.make_requests()
        expected = self.alone()
        crowd = Crowd(engine, [*requests, self.make_failing_request()], [0] * (len(requests) + 1), [None] * 99)
        *others, failed = crowd.seen
        assert isinstance(failed.last, Failure)
        self.check(others, expected)
        with pytest.raises(type(failed.last.error)):
            answers(engine, [self.make_failing_request()])
        engine.close()

    def test_a_recall_stops_nobody_who_comes_later(self) -> None:
        engine, expected = self.make_engine(), self.alone()
        gate, late = threading.Event(), Seen()

        def hear(_: int, event: Event) -> None:
            late.events.append(event)
            if isinstance(event, End | Failure):
                late.ended.set()

        [ticket] = engine.submit([self.make_late_request(gate)], hear)
        requests = self.make_requests()
        without = [index for index, one in enumerate(requests) if one.stream is None]
        found = answers(engine, [requests[index] for index in without])
        assert [one.tokens for one in found] == [expected[index].tokens for index in without]
        ticket.cancel()
        gate.set()
        late.check()
        assert late.answer.stopped_by == "cancel"
        engine.close()

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    @pytest.mark.parametrize("error", [RuntimeError, SystemExit])
    def test_a_listener_that_raises_is_not_listened_for(self, error: type[BaseException]) -> None:
        engine, requests = self.make_engine(), self.make_requests()
        expected = self.alone()

        def raises(*_: object) -> None:
            raise error("the listener fell ill")

        engine.submit(requests[1:2], raises)
        assert answers(engine, requests[:1])[0].tokens == expected[0].tokens
        engine.close()

    def test_closing_ends_what_is_under_way(self) -> None:
        engine, requests = self.make_engine(rows=2), self.make_requests()
        crowd = Crowd(engine, requests, [0] * len(requests), [None] * len(requests))
        engine.close()
        for seen in crowd.seen:
            assert seen.ended.is_set()
            seen.check()
        engine.close()
        with pytest.raises(EngineClosedError):
            engine.submit(self.make_requests()[:1], lambda *_: None)

    def test_what_is_submitted_before_the_close_has_a_last_event(self) -> None:
        """Also if the close comes while the engine tells the end of the last request that it knows."""
        engine, (first, second, *_) = self.make_engine(), self.make_requests()
        late = Seen()
        closing = threading.Thread(target=engine.close)

        def hear_late(_: int, event: Event) -> None:
            late.events.append(event)
            if isinstance(event, End | Failure):
                late.ended.set()

        def hear(_: int, event: Event) -> None:
            if isinstance(event, End):
                engine.submit([second], hear_late)
                closing.start()
                with contextlib.suppress(EngineClosedError):
                    while True:
                        engine.submit([], hear_late)

        engine.submit([first], hear)
        late.check()
        closing.join()

    def test_a_listener_closes_the_engine(self) -> None:
        engine, requests = self.make_engine(), self.make_requests()
        crowd = [Seen() for _ in requests]

        def hear(index: int, event: Event) -> None:
            crowd[index].events.append(event)
            engine.close()
            if isinstance(event, End | Failure):
                crowd[index].ended.set()

        engine.submit(requests, hear)
        for seen in crowd:
            seen.check()
        engine.close()

    def test_many_threads_ask(self) -> None:
        engine, expected = self.make_engine(rows=3), self.alone()
        requests = self.make_requests()
        found: dict[int, Answer] = {}

        def ask(index: int) -> None:
            found[index] = answers(engine, [requests[index]])[0]

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[index].tokens for index in range(len(requests))] == [answer.tokens for answer in expected]
        engine.close()

    def test_an_interrupt_cancels(self) -> None:
        engine, requests = self.make_engine(), self.make_requests()

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        show: Callable[[int, str], None] = interrupt
        with pytest.raises(KeyboardInterrupt):
            answers(engine, requests, show)
        assert answers(engine, self.make_requests()[:1])[0].tokens == self.alone()[0].tokens
        engine.close()
