"""`Both`: the same requests to vLLM and to our own adapter, over one runtime. `check_refreshed` compares some."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams

from m3model.adapter import TransformersAdapter
from m3model.vllm import hosting
from m3runtime.adapters.answers import Answer, Prompt
from m3runtime.adapters.engine import Request, answers
from m3runtime.config.schema import GenerateConfig
from m3runtime.recall.recalled import Recalled
from m3runtime.retrieval.restriction import Restriction
from m3runtime.runtime import Runtime
from m3runtime.stream import Stream

OPTIONS = {"dtype": "float32", "max_model_len": 2048, "block_size": 32, "enforce_eager": True, "max_num_seqs": 32}


@dataclass(frozen=True)
class Ask:
    """A request: a prompt, and the memories to read by id, or a recall by the query."""

    prompt: Prompt
    tokens: int = 24
    ids: tuple[tuple[int, ...], ...] | None = None
    """One for each chunk of the answer."""
    log_weights: tuple[tuple[float, ...], ...] | None = None
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def wish(self) -> dict[str, Any]:
        said = {"query": self.prompt.query, "ids": self.ids, "log_weights": self.log_weights, **dict(self.more)}
        found = {name: value for name, value in said.items() if value is not None}
        return {n: [list(one) for one in v] if n in ("ids", "log_weights") else v for n, v in found.items()}


class Told:
    """A recaller that gives the memories that it is told, by chunk."""

    def __init__(self, both: "Both", ask: Ask) -> None:
        self.config, self._both, self._ask, self._chunk = both.runtime.config, both, ask, -1
        self._size = len(both.adapter._prompt_ids([ask.prompt], sink=True)[0])

    def recall(self, streams: Sequence[Stream], texts: Sequence[str], *, wait: bool | None = None) -> list[Recalled]:
        self._chunk += 1
        size = self.config.recall.chunk_tokens
        chunk = max(0, self._chunk - (-(-self._size // size) - 1))  # the prompt's own chunks read the first
        assert self._ask.ids is not None
        at = min(chunk, len(self._ask.ids) - 1)
        return [self._both.recalled(self._ask.ids[at], (self._ask.log_weights or {at: ()})[at])]

    def hint(self, *_: object) -> None:
        """Nothing is guessed."""

    def release(self, _: object) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Got:
    """What vLLM answered."""

    tokens: tuple[int, ...]
    text: str
    log_probs: tuple[dict[int, float], ...]
    m3: dict[str, Any]
    error: bool


class Both:
    def __init__(self, runtime: Runtime, adapter: TransformersAdapter, options: dict[str, Any]) -> None:
        self.runtime, self.adapter = runtime, adapter
        slots = options.pop("slots", None)
        extra = {"config": runtime.config.model_dump(mode="json"), "hosted": True, "slots": slots}
        self.vllm = hosting.open_engine(runtime.config.model.path, {**OPTIONS, **options}, extra)
        self.connector = hosting.connector_of(self.vllm)
        self.connector.read(runtime)
        self.head = self.connector.head
        self.scheduler = self.vllm.engine_core.engine_core.scheduler

    def close(self) -> None:
        hosting.shut_down(self.vllm)

    def prompt(self, question: str, form: Any = "question") -> Prompt:
        return self.adapter.render(question, form)

    def recalled(self, ids: Sequence[int], log_weights: Sequence[float]) -> Recalled:
        parts = self.runtime.fetch(ids, self.adapter.dtype)
        return Recalled(
            ids=tuple(ids),
            scores=(0.0,) * len(ids),
            references=tuple(one for one in self.runtime.references(ids) if one),
            late=(),
            spec=self.adapter.spec,
            device=self.adapter.device,
            dtype=self.adapter.dtype,
            parts=tuple(parts[id] for id in ids),
            tokens=sum(parts[id][0].shape[2] for id in ids),
            log_weights=tuple(log_weights) or (0.0,) * len(ids),
        )

    def ours(self, asks: Sequence[Ask]) -> list[Answer]:
        """Our adapter's answers, without any end but their length."""
        requests = []
        for ask in asks:
            stream = self.runtime.stream(self.adapter.dtype, Restriction(memories=dict(ask.more).get("memories")))
            if ask.ids is not None:
                stream = Stream(Told(self, ask), self.adapter.dtype)
            settings = GenerateConfig(max_new_tokens=ask.tokens, log_probs=20)
            requests.append(Request(ask.prompt, settings, stream))
        kept, self.adapter.stop_tokens = self.adapter.stop_tokens, frozenset()
        try:
            return answers(self.adapter.engine, requests)
        finally:
            self.adapter.stop_tokens = kept

    def submit(self, ids: Sequence[int], tokens: int, params: dict[str, Any] | None, **sampling: Any) -> str:
        given = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "detokenize": False, **sampling}
        extra = {} if params is None else {"kv_transfer_params": params}
        salt, lora = given.pop("salt", None), given.pop("lora", None)
        params_ = SamplingParams(**given, extra_args=extra)
        prompt: dict[str, Any] = {"prompt_token_ids": list(ids)}
        if salt is not None:
            prompt["cache_salt"] = salt
        name = f"r{id(given)}-{len(self.done)}-{self._count()}"
        self.vllm.add_request(name, prompt, params_, lora_request=lora)
        return name

    def ids(self, ask: Ask) -> list[int]:
        return self.head.ids + self.adapter._prompt_ids([ask.prompt], sink=True)[0]

    def theirs(self, asks: Sequence[Ask], **sampling: Any) -> list[Got]:
        """vLLM's answers, all asked at once."""
        names = [self.submit(self.ids(ask), ask.tokens, {"m3": ask.wish}, logprobs=20, **sampling) for ask in asks]
        return self.wait(names)

    def wait(self, names: Sequence[str]) -> list[Got]:
        while any(name not in self.done for name in names):
            assert self.vllm.has_unfinished_requests()
            self.step()
        return [self.done.pop(name) for name in names]

    def step(self) -> None:
        for output in self.vllm.step():
            if output.finished:
                self.done[output.request_id] = self._got(output)

    def _got(self, output: Any) -> Got:
        [piece] = output.outputs
        found = tuple({token: one.logprob for token, one in each.items()} for each in piece.logprobs or ())
        m3 = (output.kv_transfer_params or {}).get("m3", {})
        return Got(
            tuple(piece.token_ids),
            self.adapter.text_of(piece.token_ids),
            found,
            m3,
            piece.finish_reason == "error",
        )

    done: dict[str, Got] = {}  # noqa: RUF012 - one engine in a process
    _numbers = 0

    def _count(self) -> int:
        self._numbers += 1
        return self._numbers

    @staticmethod
    def difference(answer: Answer, got: Got, best: int = 10) -> float:
        """The largest difference of log-probabilities of the ``best`` tokens of both, over all steps."""
        worst = 0.0
        for own, other in zip(answer.log_probs, got.log_probs, strict=True):
            for token, log_prob in own.likeliest[:best]:
                if token in other:
                    worst = max(worst, abs(other[token] - log_prob))
        return worst


def check_refreshed(both: Both, tokens: int = 80) -> None:
    """Three answers, each with a refresh in it, are our adapter's."""
    ids = [tuple(match.id for match in one) for one in both.runtime.search(["the harbour lamp", "bees", "the gate"], 2)]
    asks = [Ask(both.prompt("Tell me all that you know of the town."), tokens, (one, ids[0])) for one in ids]
    answers = both.theirs(asks)
    for own, got in zip(both.ours(asks), answers, strict=True):
        assert got.tokens == own.tokens
        assert both.difference(own, got) < 1e-3
