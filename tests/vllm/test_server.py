"""vLLM's own server with connector and middleware, a chat template that begins with the head, and OpenAI's client."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import APIStatusError, BadRequestError, OpenAIError

from m3model.adapter import TransformersAdapter
from m3runtime.config.schema import Config, GenerateConfig
from m3runtime.runtime import Runtime
from tests.vllm.plain import KEY, Plain, plain_server

pytestmark = pytest.mark.vllm

GREEDY: dict[str, Any] = {"model": "lamp", "temperature": 0}


@pytest.fixture(scope="module")
def plain(config: Config, adapter: TransformersAdapter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    with plain_server(config, tmp_path_factory.mktemp("plain")) as plain:
        yield plain


def wish(**said: Any) -> Any:
    return {"kv_transfer_params": {"m3": said}}


def test_a_prompt_of_tokens(plain: Plain, config: Config, adapter: TransformersAdapter) -> None:
    prompt = adapter.render("What does the harbour lamp burn?", "question")
    ids = plain.head.ids + adapter._prompt_ids([prompt], sink=True)[0]
    found = plain.client.completions.create(**GREEDY, prompt=ids, max_tokens=24, extra_body=wish(query=prompt.query))
    reads = found.kv_transfer_params["m3"]["reads"]  # type: ignore[attr-defined]
    with Runtime.open(config, read_only=True) as runtime, runtime.stream(adapter.dtype) as stream:
        [own] = adapter.generate([prompt], [stream], GenerateConfig(max_new_tokens=24))
    assert found.choices[0].text.startswith(own.text)
    assert [one["id"] for one in reads[0]["memories"]] == list(own.chunks[0].ids)
    assert reads[0]["memories"][0]["source"].endswith("handbook.md")


def test_a_chat_by_the_template_recalls_by_itself(plain: Plain, config: Config) -> None:
    asked: Any = [{"role": "user", "content": "What does the harbour lamp burn?"}]
    with Runtime.open(config, read_only=True) as runtime:
        [[best, *_]] = runtime.search([asked[0]["content"]])
    found = plain.client.chat.completions.create(**GREEDY, messages=asked, max_tokens=24)
    [first, *_] = found.kv_transfer_params["m3"]["reads"][0]["memories"]  # type: ignore[attr-defined]
    assert first["id"] == best.id


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_says_what_it_reads_as_it_reads_it(plain: Plain, usage: bool) -> None:
    asked: Any = [{"role": "user", "content": "Tell me all that you know of the town, in many words."}]
    whole: Any = plain.client.chat.completions.create(**GREEDY, messages=asked, max_tokens=80)
    options: Any = {"stream_options": {"include_usage": True}} if usage else {}
    parts = list(plain.client.chat.completions.create(**GREEDY, messages=asked, max_tokens=80, stream=True, **options))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == (
        whole.choices[0].message.content
    )
    told = [(number, read) for number, part in enumerate(parts) for read in _reads(part)]
    assert [{name: read[name] for name in ("tokens", "memories")} for _, read in told] == (
        whole.kv_transfer_params["m3"]["reads"]
    )
    (first, one), (later, other) = told
    assert (one["tokens"], other["tokens"]) == (0, 64)
    assert first < 5
    assert 30 < later < len(parts) - 1


def _reads(part: Any) -> list[Any]:
    return list((getattr(part, "kv_transfer_params", None) or {"m3": {"reads": []}})["m3"]["reads"])


def test_several_answers_each_say_what_they_read(plain: Plain) -> None:
    prompts = [[*plain.head.ids, *[100 + number] * 20] for number in range(2)]
    parts = plain.client.completions.create(
        model="lamp", prompt=prompts, n=2, max_tokens=4, stream=True, extra_body=wish(ids=[3])
    )
    told = [read for part in parts for read in _reads(part)]
    assert sorted((one["prompt"], one["answer"]) for one in told) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {one["memories"][0]["id"] for one in told} == {3}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"ids": [999_999]}, "no memory 999999"),
        ({"ids": [3], "log_weights": [1.0]}, "between -80 and 0"),
        ({"memory": 3}, "memory"),
        ({"ids": list(range(30))}, "tokens, and there are"),
    ],
)
def test_a_refused_request_has_its_reason(plain: Plain, said: Any, reason: str, stream: bool) -> None:
    prompt = [*plain.head.ids, 100, 200]
    with pytest.raises(OpenAIError, match=reason) as caught:
        list(plain.client.completions.create(
            model="lamp", prompt=prompt, max_tokens=4, stream=stream, extra_body=wish(**said)
        ))  # fmt: skip
    if not stream:
        assert isinstance(caught.value, BadRequestError)
        assert caught.value.param == "kv_transfer_params"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"extra_body": {**wish(ids=[3]), "prompt_logprobs": 1}}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1, "extra_body": wish(ids=[3])}, "echo with logprobs"),
        ({"prompt": [100, 200, 300], "extra_body": wish()}, "begins with 672 tokens"),
        ({"n": 2, "extra_body": {**wish(ids=[3]), "use_beam_search": True}}, "beam search"),
    ],
)
def test_what_memories_cannot_be_read_with_is_refused_by_name(plain: Plain, more: Any, reason: str) -> None:
    with pytest.raises(BadRequestError, match=reason):
        plain.client.completions.create(**{"model": "lamp", "prompt": [*plain.head.ids, 100], "max_tokens": 4, **more})


def test_an_echo_without_log_probabilities_begins_with_the_head(plain: Plain) -> None:
    asked: Any = {**GREEDY, "prompt": [*plain.head.ids, 100, 200], "max_tokens": 4, "extra_body": wish(ids=[3])}
    alone = plain.client.completions.create(**asked).choices[0].text
    echoed = plain.client.completions.create(**asked, echo=True).choices[0].text
    assert echoed.endswith(alone)
    assert len(echoed) > len(alone) + plain.head.slots


def test_a_refused_chat_has_its_reason(plain: Plain) -> None:
    with pytest.raises(BadRequestError, match="no memory 999999"):
        plain.client.chat.completions.create(
            model="lamp", messages=[{"role": "user", "content": "a"}], extra_body=wish(ids=[999_999])
        )


def test_a_client_names_its_request(plain: Plain) -> None:
    """But no client can name one so that it hears of another's."""
    mark = "m3-" + 32 * "0"
    found = plain.client.completions.create(
        model="lamp",
        prompt=[*plain.head.ids, 100],
        max_tokens=1,
        extra_body=wish(ids=[3]),
        extra_headers={"X-Request-Id": mark},
    )
    assert found.id.startswith(f"cmpl-{mark}-m3-")


def test_facts_are_for_whoever_has_the_key(plain: Plain, config: Config) -> None:
    assert httpx.get(f"{plain.url}/m3").status_code == 401
    facts = httpx.get(f"{plain.url}/m3", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert (facts["sink"], facts["slots"], facts["placeholder"]) == (
        list(plain.head.sink), plain.head.slots, plain.head.placeholder
    )  # fmt: skip
    with Runtime.open(config, read_only=True) as runtime:
        assert facts["bank"] == runtime.bank.manifest.stamp.bank


def test_the_server_goes_on(plain: Plain) -> None:
    with pytest.raises(APIStatusError):
        plain.client.completions.create(model="lamp", prompt=[100], max_tokens=4, extra_body=wish())
    found = plain.client.completions.create(model="lamp", prompt=[100, 200, 300], max_tokens=4)
    assert found.choices[0].text
