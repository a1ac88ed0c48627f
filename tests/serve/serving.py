"""A real server on a real port, in a thread of the tests' process."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.cli.demo import HANDBOOK
from m3runtime.config.schema import Config
from m3runtime.documents.reading import read_documents
from m3runtime.runtime import Runtime
from m3runtime.serve.keys import Keys
from m3runtime.serve.served import Served
from m3runtime.serve.server import Server
from m3runtime.writing.writer import Writer
from tests.end_to_end.commands import Place
from tests.model.banks import make_runtime
from tests.model.families import make_adapter, make_tokenizer

TOPICS = {
    "lamp": "the harbour lamp burns walnut oil",
    "ferry": "the ferry to brannoch sails on monday",
    "bread": "caraway goes into the flat loaves",
    "wall": "quarrymen built the northern wall",
    "heron": "seventeen herons nest at the abbey",
    "owl": "an owl named perpetua keeps the books",
}
"""A text of each source."""


@dataclass
class Serving:
    """A server that runs."""

    server: Server
    key: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def name(self) -> str:
        return self.server.served.name

    def http(self, key: str | None = None) -> httpx.Client:
        """A client. Its key is the server's unless another one is given."""
        key = self.key if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0)

    def chat(self, text: str, **fields: Any) -> httpx.Response:
        """Ask one question."""
        body = {"model": self.name, "messages": [{"role": "user", "content": text}], **fields}
        with self.http() as client:
            return client.post("/v1/chat/completions", json=body)


def data_of(lines: Iterator[str]) -> list[Any]:
    """The data of server-sent events."""
    found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in found]


@contextmanager
def running(runtime: Runtime, adapter: Adapter, environ: dict[str, str] | None = None) -> Iterator[Serving]:
    """Serve until the end of the block."""
    server = Server(Served.of(runtime, adapter, Keys.load(runtime.config.serve.keys_file, environ or {})))
    thread = threading.Thread(target=server.serve_until_stopped, name="server")
    thread.start()
    try:
        yield Serving(server)
    finally:
        server.should_exit = True
        thread.join()


FUEL = "What is the harbour lamp's fuel?"
"""A question that `smollm2` answers from memory, by the word *walnut*, and not without."""


@contextmanager
def smollm2(path: Path, model: Path) -> Iterator[Serving]:
    """A server over SmolLM2-135M, and a bank of the beginning of the demo's handbook."""
    place = Place(path)
    place.configure(
        bank="./bank",
        model={"path": str(model)},
        memory={"attention_temperature": 0.9},
        codec={"kind": "scalar"},
        embedder={"kind": "tests.end_to_end.embedders:HashedWords", "path": "hashed"},  # a real one takes seconds
        recall={"min_score": 0.1, "when_late": "wait"},
        generate={"prompt": "reference", "max_new_tokens": 24, "stop": ["\n"]},
        serve={"name": "smollm2", "port": 0},
    )
    config = Config.load(place.file, environ={})
    (handbook,) = read_documents([HANDBOOK])
    beginning = replace(handbook, content=handbook.text.partition("## Bridges")[0])
    adapter = assembly.open_adapter(config)
    try:
        Writer(config, adapter, assembly.open_embedder(config)).write([beginning])
        with Runtime.open(config, read_only=True) as runtime, running(runtime, adapter) as serving:
            yield serving
    finally:
        adapter.close()


@contextmanager
def tiny(
    path: Path, environ: dict[str, str] | None = None, texts: Sequence[tuple[str, str]] | None = None, **options: Any
) -> Iterator[Serving]:
    """A server over the tiny random model and a bank of texts, each with its source; default: `TOPICS`."""
    texts = [(f"{name}.txt", text) for name, text in TOPICS.items()] if texts is None else texts
    tokenizer = make_tokenizer(eos=False, text=" ".join(TOPICS.values()))
    adapter = make_adapter(tokenizer=tokenizer)
    defaults = {"generate": {"max_new_tokens": 20}, "serve": {}}
    options = defaults | options
    options["serve"] = {"name": "tiny", "port": 0, "grace": 5, **options["serve"]}
    sources, contents = zip(*texts, strict=True)
    with make_runtime(adapter, path / "bank", contents, sources=sources, **options) as runtime:
        adapter.rows = runtime.config.model.rows
        try:
            with running(runtime, adapter, environ) as serving:
                yield serving
        finally:
            adapter.close()
