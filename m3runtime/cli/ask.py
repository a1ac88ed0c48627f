"""``m3 ask`` and ``m3 chat``: answer from a bank."""

import errno
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3runtime.cli.citing import citation, cited
from m3runtime.cli.options import ConfigFile, Json, Set, Where, as_text, configuration, restriction
from m3runtime.cli.terminal import print_json, say
from m3runtime.cli.underlining import LEAST, underline
from m3runtime.errors import BankBusyError, BankError

if TYPE_CHECKING:
    from m3runtime.adapters.answers import Answer, Prompt
    from m3runtime.adapters.base import Adapter
    from m3runtime.adapters.grounding import Grounding
    from m3runtime.documents.reference import Reference
    from m3runtime.runtime import Runtime

NoMemory = Annotated[bool, typer.Option("--no-memory", help="The model as it is: recall nothing.")]


def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    config: ConfigFile = None,
    no_memory: NoMemory = False,
    where: Where = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Answer one question, and list the memories that were read."""
    with _Talk(config, set, where, no_memory=no_memory, lasting=False) as talk:
        prompt = talk.adapter.render(as_text("the question", question), talk.settings.generate.prompt)
        answer = talk.answer(prompt, shown=not json)
        if json:
            print_json({"question": question, **talk.summary(answer)})
        else:
            talk.print_memories(answer)


def chat(
    config: ConfigFile = None,
    no_memory: NoMemory = False,
    where: Where = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Chat with the model, line by line, until the end of input.

    Each message recalls memories. With --json, each answer is one line of JSON.
    """
    with _Talk(config, set, where, no_memory=no_memory, lasting=True) as talk:
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # so that a line that is no text can be told of
        messages: list[dict[str, str]] = []
        while True:
            if sys.stdin.isatty():
                say("> ", nl=False, err=True)
            line = sys.stdin.readline()
            if not line:
                return
            if not line.strip():
                continue
            messages.append({"role": "user", "content": as_text("the line", line.strip())})
            answer = talk.answer(talk.adapter.chat(messages), shown=not json)
            messages.append({"role": "assistant", "content": answer.text})
            if json:
                print_json({"message": line.strip(), **talk.summary(answer)})
            else:
                talk.print_memories(answer)


class _Talk(ExitStack):
    """A model with its runtime for one command."""

    def __init__(
        self,
        file: Path | None,
        settings: list[str] | None,
        where: list[str] | None,
        *,
        no_memory: bool,
        lasting: bool,
    ) -> None:
        super().__init__()
        self.settings = configuration(file, settings)
        self._restriction = restriction(where)
        from m3runtime import assembly
        from m3runtime.plugins.loading import load

        gc.freeze()  # torch stays to the end: Python need not search its objects once more then
        self.runtime: Runtime | None = None
        with ExitStack() as opened:  # closes what is open if the next cannot be opened
            if not no_memory:
                with ThreadPoolExecutor(1) as aside:
                    if (self.settings.bank / "home").exists():  # else the error should not wait for it
                        # The transformers library takes longer to import than a bank to open.
                        aside.submit(load, "adapters", self.settings.model.adapter)
                    self.runtime = opened.enter_context(self._open_runtime(lasting=lasting))
            device = None if self.runtime is None else self.runtime.device
            self.adapter: Adapter = assembly.open_adapter(self.settings, device)
            opened.callback(self.adapter.close)
            if self.runtime is not None:
                self.runtime.encoder = self.adapter  # which refuses another model's bank
            self.push(opened.pop_all())

    def _open_runtime(self, *, lasting: bool) -> "Runtime":
        """A runtime that keeps the index and sets apart what is damaged, unless it would keep a writer out for long.

        One that stores what it encodes must write, or says that it cannot.
        """
        from m3runtime.runtime import Runtime

        cold_start = self.settings.recall.cold_start
        try:
            return Runtime.open(self.settings, read_only=lasting and not cold_start)
        except BankError as error:
            if cold_start or not (isinstance(error, BankBusyError) or _is_read_only(error)):
                raise
            return Runtime.open(self.settings, read_only=True)

    def answer(self, prompt: "Prompt", *, shown: bool) -> "Answer":
        def show(_: int, text: str) -> None:
            say(text, nl=False)

        on_text = show if shown else None
        settings = self.settings.generate.model_copy(update={"grounding": self.adapter.grounds})
        if self.runtime is None:
            (answer,) = self.adapter.generate([prompt], None, self.settings.generate, on_text)
        else:
            if self.settings.recall.condense:
                from m3runtime.adapters.condensing import condensed

                (prompt,) = condensed(self.adapter, [prompt])
            with self.runtime.stream(self.adapter.dtype, self._restriction) as stream:
                (answer,) = self.adapter.generate([prompt], [stream], settings, on_text)
        if shown:
            say()
        return answer

    def summary(self, answer: "Answer") -> dict[str, Any]:
        shares = {} if answer.grounding is None else answer.grounding.memories
        memories = [
            {"id": id, "score": round(score, 4), "share": _rounded(shares.get(id)), **citation(one)}
            for id, score, one in _memories(answer)
        ]
        return {
            "answer": answer.text.strip(),
            "stopped_by": answer.stopped_by,
            "found": answer.found,
            "grounded": answer.grounded,
            "memories": memories,
            "grounding": None if answer.grounding is None else _grounding(answer, answer.grounding),
            "first_token_s": answer.first_token_s,
            "tokens_per_s": answer.tokens_per_s,
        }

    def print_memories(self, answer: "Answer") -> None:
        memories = _memories(answer)
        if answer.grounding is not None:
            numbers = {id: number for number, (id, _, _) in enumerate(memories, 1)}
            underline(answer.text, answer.grounding.spans(LEAST), numbers)
        say(
            f"\n{len(answer.memories)} memories read, first token after {answer.first_token_s:.2f} s, "
            f"{answer.tokens_per_s:.1f} tokens/s",
            err=True,
        )
        if self.runtime is not None and not answer.found:
            say("nothing was recalled: the answer is the model's own (recall.min_score, --where)", err=True)
        elif answer.grounded is False:
            say(
                f"not grounded: the memory that was read most does not bear the answer out (evidence "
                f"{answer.evidence:.2f}, generate.grounding_floor {self.settings.generate.grounding_floor:g})",
                err=True,
            )
        shares = {} if answer.grounding is None else answer.grounding.memories
        for number, (id, score, reference) in enumerate(memories, 1):
            text = " ".join(reference.text.split())
            share = f"{shares[id]:4.0%}" if id in shares else "   -"
            say(f"  [{number}]  {score:.2f}  {share}  {id:>6}  {cited(reference)}  {text[:70]}", err=True)


def _memories(answer: "Answer") -> "list[tuple[int, float, Reference]]":
    """The id, score and reference of each memory that was read."""
    references = {id: one for chunk in answer.chunks for id, one in zip(chunk.ids, chunk.references, strict=True)}
    return [(id, score, references[id]) for id, score in answer.memories.items()]


def _grounding(answer: "Answer", grounding: "Grounding") -> dict[str, Any]:
    """The share of all memories, and the parts of the answer, without white space around it, that each one led."""
    shift, end = len(answer.text) - len(answer.text.lstrip()), len(answer.text.strip())
    spans = list[dict[str, Any]]()
    for span in grounding.spans(0.0):
        first, last = max(0, span.start - shift), min(span.end - shift, end)
        if first < last:
            spans.append({"start": first, "end": last, "id": span.id, "share": _rounded(span.share)})
    return {
        "share": _rounded(grounding.share),
        "lead": _rounded(grounding.lead),
        "evidence": _rounded(answer.evidence),
        "spans": spans,
    }


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def _is_read_only(error: BankError) -> bool:
    """Is the bank where this process may not write?"""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
