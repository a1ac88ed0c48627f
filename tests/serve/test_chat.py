"""Chat completions, by plain HTTP and by OpenAI's client."""

from itertools import pairwise
from pathlib import Path

import pytest

from tests.serve.serving import TOPICS, Serving, data_of, tiny

QUESTION = "what does the harbour lamp burn?"


def test_an_answer_with_usage_and_the_memories_that_were_read(serving: Serving) -> None:
    answer = serving.chat(QUESTION, memory={"text": True}).json()
    (choice,) = answer["choices"]
    message, usage = choice["message"], answer["usage"]
    assert (answer["object"], answer["model"], choice["finish_reason"]) == ("chat.completion", "tiny", "length")
    assert message["content"]
    assert usage["completion_tokens"] == 20
    assert usage["total_tokens"] == usage["prompt_tokens"] + 20
    assert usage["prompt_tokens"] > usage["prompt_tokens_details"]["cached_tokens"] > 0
    first = message["memories"][0]
    assert (first["source"], first["text"], first["span"]) == ("lamp.txt", TOPICS["lamp"], [0, len(TOPICS["lamp"])])


def test_citations_stand_where_their_memories_were_read(serving: Serving) -> None:
    """Memories have the chunk in which they could be read; citations the spans to which they had most attention."""
    message = serving.chat(QUESTION).json()["choices"][0]["message"]
    read = [one for one in message["memories"] if one["end_index"] > one["start_index"]]
    chunks = sorted({(one["start_index"], one["end_index"]) for one in read})
    assert len(chunks) == 3  # 20 tokens in chunks of 8
    assert chunks[0][0] == 0
    assert all(before[1] == after[0] for before, after in pairwise(chunks))
    assert chunks[-1][1] == len(message["content"])
    for one in read:
        assert 0 <= one["share"] < 1
        assert all(one["start_index"] <= start < end <= one["end_index"] for start, end in one["spans"])
    assert max(one["share"] for one in read) > 0
    cited = [one["url_citation"] for one in message["annotations"]]
    assert [(one["source"], *span) for one in read for span in one["spans"]] == [
        (one["title"], one["start_index"], one["end_index"]) for one in cited
    ]
    spans = sorted((one["start_index"], one["end_index"]) for one in cited)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))  # one memory leads at a time
    assert spans[-1][1] == len(message["content"])
    assert "text" not in read[0]


@pytest.mark.parametrize(("refresh", "places"), [(0, 1), (1, 3), (2, 2)])
def test_a_request_says_how_often_memories_are_chosen_anew(serving: Serving, refresh: int, places: int) -> None:
    message = serving.chat(QUESTION, memory={"refresh": refresh}).json()["choices"][0]["message"]
    read = [one for one in message["memories"] if one["end_index"] > one["start_index"]]
    assert len({one["start_index"] for one in read}) == places
    assert max(one["end_index"] for one in read) == len(message["content"])


def test_a_request_has_conditions_on_metadata(serving: Serving) -> None:
    asked = serving.chat(QUESTION, memory={"where": {"source": {"prefix": "lam"}}, "min_score": -1}).json()
    assert {one["source"] for one in asked["choices"][0]["message"]["memories"]} == {"lamp.txt"}
    none = serving.chat(QUESTION, memory={"where": {"lang": "en"}, "min_score": -1}).json()
    assert none["choices"][0]["message"]["memories"] == []
    refused = serving.chat(QUESTION, memory={"where": {"lang": {"above": 1}}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "memory.where"


def test_a_stream_says_what_the_answer_says_at_once(serving: Serving) -> None:
    whole = serving.chat(QUESTION, seed=1).json()
    body = {"stream": True, "stream_options": {"include_usage": True}, "seed": 1}
    response = serving.chat(QUESTION, **body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = data_of(iter(response.text.splitlines()))
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    message = whole["choices"][0]["message"]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    assert [one for delta in deltas for one in delta.get("annotations", [])] == message["annotations"]
    read = [one["id"] for delta in deltas for one in delta.get("memories", [])]
    assert read == [one["id"] for one in message["memories"]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("memory", "found"),
    [
        ({}, True),
        ({"as_text": True}, True),
        ({"off": True}, False),
        ({"min_score": 1}, False),
        ({"sources": ["nowhere.txt"], "as_text": True}, False),
    ],
)
def test_an_answer_says_whether_anything_was_recalled(serving: Serving, memory: dict[str, object], found: bool) -> None:
    fields = {"memory": memory, "max_tokens": 2, "n": 2}
    whole = serving.chat(QUESTION, **fields).json()
    assert [one["message"]["found"] for one in whole["choices"]] == [found, found]
    assert not any("grounded" in one["message"] for one in whole["choices"])
    *chunks, _ = data_of(iter(serving.chat(QUESTION, stream=True, **fields).text.split("\n")))
    told = [chunk["choices"][0] for chunk in chunks if "found" in chunk["choices"][0]["delta"]]
    assert [(one["delta"]["found"], one["finish_reason"]) for one in told] == [(found, "length")] * 2


def test_an_answer_with_little_evidence_is_marked(tmp_path: Path) -> None:
    """Not an answer that was not to read any memory. `test_an_answer_says_...` has no floor, and no such field."""
    with tiny(tmp_path, generate={"max_new_tokens": 4, "grounding_floor": 1.0}) as strict:
        assert strict.chat(QUESTION).json()["choices"][0]["message"]["grounded"] is False
        *_, last, _ = data_of(iter(strict.chat(QUESTION, stream=True).text.split("\n")))
        assert last["choices"][0]["delta"]["grounded"] is False
        assert "grounded" not in strict.chat(QUESTION, memory={"off": True}).json()["choices"][0]["message"]


def test_a_stream_says_when_no_memories_are_read_any_more(serving: Serving) -> None:
    best = serving.chat(QUESTION).json()["choices"][0]["message"]["memories"][0]["score"]
    memory = {"min_score": best - 0.01}  # the answer's own words are further from all memories
    message = serving.chat(QUESTION, memory=memory).json()["choices"][0]["message"]
    (cited,) = (one["url_citation"] for one in message["annotations"])
    assert 0 < cited["end_index"] < len(message["content"])
    *chunks, _ = data_of(iter(serving.chat(QUESTION, memory=memory, stream=True).text.split("\n")))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [len(delta["memories"]) for delta in deltas if "memories" in delta][-2:] == [1, 0]
    last = next(place for place, delta in enumerate(deltas) if delta.get("memories") == [])
    assert "".join(delta.get("content", "") for delta in deltas[:last]) == message["content"][: cited["end_index"]]


def test_openais_client_reads_answers_and_streams(serving: Serving) -> None:
    client = serving.openai()
    messages = [
        {"role": "system", "content": "answer"},
        {"role": "user", "content": [{"type": "text", "text": "lamp"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, logprobs=True, top_logprobs=2, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    content = answer.choices[0].logprobs.content
    assert len(content) == 20
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in content)
    assert answer.choices[0].message.annotations[0].url_citation.url.startswith("memory:")
    with client.chat.completions.create(model="tiny", messages=messages, stream=True) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == answer.choices[0].message.content


def test_an_earlier_answer_may_be_given_back_as_it_came(serving: Serving) -> None:
    client = serving.openai()
    asked = [{"role": "user", "content": "lamp"}]
    for memory in ({}, {"as_text": True}):
        earlier = client.chat.completions.create(model="tiny", messages=asked, extra_body={"memory": memory})
        message = earlier.choices[0].message
        plain = {"role": "assistant", "content": message.content}
        texts = [
            client.chat.completions.create(model="tiny", messages=[*asked, one, *asked]).choices[0].message.content
            for one in (message, plain)
        ]
        assert texts[0] == texts[1]
    told = serving.chat("lamp", messages=[{"role": "user", "content": "lamp", "memories": [1]}])
    assert told.status_code == 400


def test_memories_count_once_whatever_the_number_of_answers(serving: Serving) -> None:
    alone, three = (serving.chat(QUESTION, n=n, memory={"refresh": 0}).json() for n in (1, 3))
    assert len({one["message"]["content"] for one in three["choices"]}) == 1  # so they read the same memories
    assert three["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert three["usage"]["prompt_tokens_details"] == alone["usage"]["prompt_tokens_details"]


def test_memory_off_reads_none(serving: Serving) -> None:
    answer = serving.chat(QUESTION, memory={"off": True}).json()
    assert answer["choices"][0]["message"]["memories"] == []
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_references_as_text_make_a_longer_prompt(serving: Serving) -> None:
    alone, text = (serving.chat(QUESTION, memory={one: True}).json() for one in ("off", "as_text"))
    assert text["usage"]["prompt_tokens"] > alone["usage"]["prompt_tokens"] + 10
    message = text["choices"][0]["message"]
    assert message["memories"] == []
    assert message["references"][0]["source"] == "lamp.txt"
    assert "references" not in alone["choices"][0]["message"]
    *chunks, _ = data_of(iter(serving.chat(QUESTION, memory={"as_text": True}, stream=True).text.splitlines()))
    assert chunks[0]["choices"][0]["delta"]["references"] == message["references"]


def test_a_request_restricts_the_memories_of_each_chunk(serving: Serving) -> None:
    def read(**memory: object) -> list[dict[str, object]]:
        return serving.chat(QUESTION, memory=memory).json()["choices"][0]["message"]["memories"]

    assert {one["source"] for one in read(sources=["owl.txt", "wall.txt"])} <= {"owl.txt", "wall.txt"}
    assert len(read(memories=1)) < len(read())
    assert read(memories=0) == read(sources=["nowhere.txt"]) == read(min_score=1) == []


def test_sampling_follows_its_seed(serving: Serving) -> None:
    def text(**fields: object) -> str:
        return serving.chat(QUESTION, temperature=2, **fields).json()["choices"][0]["message"]["content"]

    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert text() != text()  # another seed each time


def test_numbers_at_the_edge_disturb_nobody(serving: Serving) -> None:
    edge = {"top_k": 10**30, "top_p": 5e-324, "temperature": 5e-324, "min_p": 1.0, "repetition_penalty": 0.01}
    assert serving.chat(QUESTION, **edge, logit_bias={"7": 100}, logprobs=True).status_code == 200


def test_stop_texts_and_lengths_end_an_answer(serving: Serving) -> None:
    whole = serving.chat(QUESTION).json()["choices"][0]["message"]["content"]
    stop = whole[4:6]
    (choice,) = serving.chat(QUESTION, stop=stop).json()["choices"]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert serving.chat(QUESTION, max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"function_call": "auto"}, "function_call"),
        ({"memory": {"refresh": False}}, "memory.refresh"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"stream_options": {"include_obfuscation": True}, "stream": True}, "stream_options.include_obfuscation"),
        ({"n": 9}, "n"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages.0.content.0.image_url",
        ),
        ({"memory": {"memories": 99}}, "memory.memories"),
        ({"logit_bias": {"none": 1}}, None),
        ({"logit_bias": {"5": 101}}, None),
        ({"logit_bias": {"999999": 1}}, None),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    serving: Serving, fields: dict[str, object], param: str | None
) -> None:
    response = serving.chat(QUESTION, **fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert param is None or (error["param"] == param and param in error["message"]), error


def test_fields_that_are_null_count_as_left_out(serving: Serving) -> None:
    assert serving.chat(QUESTION, tools=None, temperature=None, user="somebody").status_code == 200


def test_an_unknown_model_is_not_found(serving: Serving) -> None:
    response = serving.chat(QUESTION, model="gpt-4")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_a_prompt_beyond_the_model_is_refused(serving: Serving) -> None:
    for fields in ({}, {"stream": True}):
        response = serving.chat("lamp " * 2000, **fields)
        assert response.status_code == 400
        assert "tokens" in response.json()["error"]["message"]


def test_an_answer_begins_without_the_white_space_that_a_model_writes(serving: Serving) -> None:
    adapter = serving.server.served.adapter
    token = next(one for one in range(600) if adapter.text_of([one]) == " the")
    bias = {"logit_bias": {str(token): 100}, "max_tokens": 3}
    assert serving.chat(QUESTION, **bias).json()["choices"][0]["message"]["content"] == "the the the"
    streamed = data_of(iter(serving.chat(QUESTION, **bias, stream=True).text.splitlines()))[:-1]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in streamed) == "the the the"
    with serving.http() as client:
        text = client.post("/v1/completions", json={"model": "tiny", "prompt": QUESTION, **bias}).json()
    assert text["choices"][0]["text"] == " the the the"
