"""``m3 ask`` and ``m3 chat``: answer from a bank."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3runtime.cli.citing import citation, cited
from m3runtime.cli.options import ConfigFile, Json, Set, configuration, print_json
from m3runtime.errors import BankBusyError

if TYPE_CHECKING:
    from m3runtime.adapters.answers import Answer, Prompt
    from m3runtime.adapters.base import Adapter
    from m3runtime.documents.reference import Reference
    from m3runtime.runtime import Runtime

NoMemory = Annotated[bool, typer.Option("--no-memory", help="The model as it is: recall nothing.")]


def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    config: ConfigFile = None,
    no_memory: NoMemory = False,
    set: Set = None,
    json: Json = False,
) -> None:
    """Answer one question, and list the memories that were read."""
    with _Talk(config, set, no_memory=no_memory, lasting=False) as talk:
        prompt = talk.adapter.render(question, talk.settings.generate.prompt)
        answer = talk.answer(prompt, shown=not json)
        if json:
            print_json({"question": question, **talk.summary(answer)})
        else:
            talk.print_memories(answer)


def chat(config: ConfigFile = None, no_memory: NoMemory = False, set: Set = None, json: Json = False) -> None:
    """Chat with the model, line by line, until the end of input.

    Each message recalls memories. With --json, each answer is one line of JSON.
    """
    with _Talk(config, set, no_memory=no_memory, lasting=True) as talk:
        messages: list[dict[str, str]] = []
        while True:
            if sys.stdin.isatty():
                typer.echo("> ", nl=False, err=True)
            line = sys.stdin.readline()
            if not line:
                return
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line.strip()})
            answer = talk.answer(talk.adapter.chat(messages), shown=not json)
            messages.append({"role": "assistant", "content": answer.text})
            if json:
                print_json({"message": line.strip(), **talk.summary(answer)})
            else:
                talk.print_memories(answer)


class _Talk(ExitStack):
    """A model with its runtime for one command."""

    def __init__(self, file: Path | None, settings: list[str] | None, *, no_memory: bool, lasting: bool) -> None:
        super().__init__()
        self.settings = configuration(file, settings)
        from m3runtime import assembly

        self.runtime: Runtime | None = None
        with ExitStack() as opened:  # closes what is open if the next cannot be opened
            if not no_memory:
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
        except BankBusyError:
            if cold_start:
                raise
            return Runtime.open(self.settings, read_only=True)

    def answer(self, prompt: "Prompt", *, shown: bool) -> "Answer":
        def show(_: int, text: str) -> None:
            typer.echo(text, nl=False)

        on_text = show if shown else None
        if self.runtime is None:
            (answer,) = self.adapter.generate([prompt], None, self.settings.generate, on_text)
        else:
            with self.runtime.stream(self.adapter.dtype) as stream:
                (answer,) = self.adapter.generate([prompt], [stream], self.settings.generate, on_text)
        if shown:
            typer.echo()
        return answer

    def summary(self, answer: "Answer") -> dict[str, Any]:
        return {
            "answer": answer.text.strip(),
            "stopped_by": answer.stopped_by,
            "memories": [{"id": id, "score": round(score, 4), **citation(one)} for id, score, one in _memories(answer)],
            "first_token_s": answer.first_token_s,
            "tokens_per_s": answer.tokens_per_s,
        }

    def print_memories(self, answer: "Answer") -> None:
        typer.echo(
            f"\n{len(answer.memories)} memories read, first token after {answer.first_token_s:.2f} s, "
            f"{answer.tokens_per_s:.1f} tokens/s",
            err=True,
        )
        for id, score, reference in _memories(answer):
            text = " ".join(reference.text.split())
            typer.echo(f"  {score:.2f}  {id:>6}  {cited(reference)}  {text[:70]}", err=True)


def _memories(answer: "Answer") -> "list[tuple[int, float, Reference]]":
    """The id, score and reference of each memory that was read."""
    references = {id: one for chunk in answer.chunks for id, one in zip(chunk.ids, chunk.references, strict=True)}
    return [(id, score, references[id]) for id, score in answer.memories.items()]
