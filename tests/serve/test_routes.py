"""The other routes of the API, and the operation of a server."""

import json
import logging
from base64 import b64decode

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from m3runtime.serve import logs
from tests.serve.serving import TOPICS, Serving, data_of


def test_models_are_listed(serving: Serving) -> None:
    client = serving.openai()
    assert [one.id for one in client.models.list()] == ["tiny", "tiny-embedder"]
    assert client.models.retrieve("tiny").owned_by == "m3runtime"
    with serving.http() as http:
        assert http.get("/v1/models/gpt").json()["error"]["code"] == "model_not_found"


def test_embeddings_are_those_that_recalls_search_with(serving: Serving) -> None:
    texts = [TOPICS["lamp"], "caraway"]
    expected = serving.server.served.runtime.retriever.embedder.embed_queries(texts)
    client = serving.openai()
    for form in ("float", "base64"):
        found = client.embeddings.create(model="tiny-embedder", input=texts, encoding_format=form)
        vectors = [one.embedding for one in found.data]
        if form == "base64":
            vectors = [np.frombuffer(b64decode(one), "<f4") for one in vectors]
        assert np.allclose(vectors, expected, atol=1e-6)
        assert found.usage.prompt_tokens > 0
    assert len(client.embeddings.create(model="tiny", input="lamp").data[0].embedding) == expected.shape[1]
    assert serving.server.served.gate.taken == 0


@pytest.mark.parametrize("fields", [{"input": []}, {"input": " "}, {"input": ["a", ""]}, {"dimensions": 3}, {"x": 1}])
def test_embeddings_refuse_what_they_cannot(serving: Serving, fields: dict[str, object]) -> None:
    with serving.http() as http:
        response = http.post("/v1/embeddings", json={"model": "tiny", "input": "lamp", **fields})
        assert response.status_code == 400


def test_completions_continue_texts_as_they_are(serving: Serving) -> None:
    client = serving.openai()
    prompts = ["the harbour lamp", "an owl"]
    both = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=12, logprobs=1)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in both.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    (alone,) = client.completions.create(model="tiny", prompt=prompts[1], max_tokens=12).choices
    assert alone.text == texts[2]
    log_probs = both.choices[0].logprobs
    assert len(log_probs.tokens) == len(log_probs.text_offset) == 12
    assert both.choices[0].memories[0]["source"] == "lamp.txt"
    assert both.choices[0].found
    with client.completions.create(model="tiny", prompt=prompts[1], max_tokens=12, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == alone.text


def test_tokens_have_their_places_in_the_text(serving: Serving) -> None:
    """A random model writes characters of several tokens, and parts of characters."""
    body = {"model": "tiny", "prompt": "the lamp", "max_tokens": 60, "logprobs": 0, "seed": 3, "temperature": 2}
    with serving.http() as http:
        (whole,) = http.post("/v1/completions", json=body).json()["choices"]
        *chunks, _ = data_of(iter(http.post("/v1/completions", json={**body, "stream": True}).text.split("\n")))
    told = whole["logprobs"]
    pairs = list(zip(told["tokens"], told["text_offset"], strict=True))
    words = [(token, place) for token, place in pairs if "\ufffd" not in token]
    assert 10 < len(words) < len(pairs)
    assert [whole["text"][place : place + len(token)] for token, place in words] == [token for token, _ in words]
    streamed = [one["logprobs"] for chunk in chunks for one in chunk["choices"] if one["logprobs"]]
    assert [place for one in streamed for place in one["text_offset"]] == told["text_offset"]


@pytest.mark.parametrize("field", ["echo", "suffix", "best_of"])
def test_completions_refuse_by_name(serving: Serving, field: str) -> None:
    with serving.http() as http:
        body = {"model": "tiny", "prompt": "lamp", field: 1}
        assert http.post("/v1/completions", json=body).json()["error"]["param"] == field


def test_responses_cite_files_and_addresses(serving: Serving) -> None:
    client = serving.openai()
    given = client.responses.create(model="tiny", input="what does the harbour lamp burn?", max_output_tokens=20)
    chat = serving.chat("what does the harbour lamp burn?").json()
    assert given.output_text == chat["choices"][0]["message"]["content"]
    assert (given.status, given.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert given.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert given.usage.input_tokens_details.cached_tokens > 0
    annotations = given.output[0].content[0].annotations
    assert {one.type for one in annotations} == {"url_citation", "file_citation"}
    assert {one.filename for one in annotations if one.type == "file_citation"} <= {f"{name}.txt" for name in TOPICS}
    assert given.found


def test_an_earlier_response_may_be_given_back_as_it_came(serving: Serving) -> None:
    client = serving.openai()
    earlier = client.responses.create(model="tiny", input="lamp", max_output_tokens=12)
    asked = {"role": "user", "content": "owl"}
    labelled = {"role": "assistant", "content": earlier.output_text, "phase": "final_answer"}
    texts = [
        client.responses.create(model="tiny", input=[asked, one, asked], max_output_tokens=12).output_text
        for one in (earlier.output[0], labelled)
    ]
    assert texts[0] == texts[1]


def test_responses_stream_the_events_that_clients_expect(serving: Serving) -> None:
    client = serving.openai()
    turns = [{"role": "user", "content": [{"type": "input_text", "text": "lamp"}]}]
    fields = {"model": "tiny", "instructions": "be short", "input": turns, "max_output_tokens": 12}
    whole = client.responses.create(**fields)
    with client.responses.create(**fields, stream=True) as stream:
        events = list(stream)
    names = [event.type for event in events]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert "response.output_text.annotation.added" in names
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.found
    assert not hasattr(events[0].response, "found")  # nobody knows yet


@pytest.mark.parametrize("field", ["previous_response_id", "tools", "reasoning", "background", "include"])
def test_responses_refuse_by_name(serving: Serving, field: str) -> None:
    with serving.http() as http:
        body = {"model": "tiny", "input": "lamp", field: "x"}
        assert http.post("/v1/responses", json=body).json()["error"]["param"] == field


def test_head_is_answered_as_get_is_but_for_the_body(serving: Serving) -> None:
    with serving.http() as http:
        described = http.get("/openapi.json").json()["paths"]
        paths = [path for path, methods in described.items() if "get" in methods and "{" not in path]
        for path in (*paths, "/", "/assets/main.js", "/v1/models/tiny", "/v1/models/none", "/openapi.json"):
            got, told = http.get(path), http.head(path)
            assert (told.status_code, told.content) == (got.status_code, b""), path
            assert told.headers["content-type"] == got.headers["content-type"]
        assert "/health" in paths
        assert http.head("/v1/completions").status_code == 405


def test_a_query_that_a_route_does_not_take_is_refused_by_name(serving: Serving) -> None:
    with serving.http() as http:
        described = http.get("/openapi.json").json()["paths"]
        routes = [(path, method) for path, methods in described.items() for method in methods]
        for path, method in routes:
            told = http.request(method, path, params={"colour": "blue"}, json={})
            if path.startswith("/health"):  # monitors bring their own
                assert told.status_code == 200
            else:
                assert (told.status_code, told.json()["error"]["param"]) == (400, "colour"), (path, told.text)
        assert len(routes) > 15
        assert http.get("/?from=mail").status_code == 200
        twice = http.delete("/v1/corpus/sources?source=owl.txt&source=lamp.txt")
        assert (twice.status_code, twice.json()["error"]["message"]) == (400, "source is given twice")
        assert http.get("/v1/corpus/sources").json()["total"] == len(TOPICS)


def test_metrics_tell_of_the_server_and_of_its_recalls(serving: Serving) -> None:
    def read() -> dict[str, float]:
        with serving.http() as http:
            text = http.get("/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {f"{one.name}{sorted(one.labels.values())}": one.value for one in samples}

    before = read()
    serving.chat("lamp", max_tokens=9)
    after = read()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("m3_serve_tokens_total['answer']") == 9
    assert more("m3_serve_answers_total['length']") == 1
    assert more("m3_serve_token_seconds_count['first']") == 1
    assert more("m3_serve_token_seconds_count['next']") == 8
    assert more("m3_recall_chunks_total[]") >= 2
    assert after["m3_serve_rows[]"] == after["m3_serve_queue[]"] == 0
    assert any(name.startswith("m3_tier_read_seconds") for name in after)


def test_a_request_has_an_id_and_a_line_in_the_log(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "m3runtime.serve"), serving.http() as http:
        given = http.get("/v1/models", headers={"X-Request-Id": "mine-1"})
        made = http.get("/v1/models/none", headers={"X-Request-Id": 'no"good\\'})
    assert given.headers["x-request-id"] == "mine-1"
    assert made.headers["x-request-id"].startswith("req-")
    lines = [json.loads(logs.Lines().format(one)) for one in caplog.records if one.name == "m3runtime.serve"]
    first, second = (line for line in lines if line["message"] == "request")
    assert (first["request_id"], first["route"], first["status"]) == ("mine-1", "/v1/models", 200)
    assert (second["route"], second["status"]) == ("/v1/models/{name}", 404)
    assert not any("none" in str(line) for line in lines)


def test_every_event_of_a_stream_is_one_line(serving: Serving) -> None:
    text = serving.chat("lamp", stream=True, memory={"text": True}).text
    assert all(line.startswith("data: ") for line in text.split("\n") if line)
    assert data_of(iter(text.split("\n")))[-1] == "[DONE]"


def test_the_description_of_the_api_names_every_route(serving: Serving) -> None:
    with serving.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/models"} <= set(paths)


def test_the_description_of_the_api_has_the_errors_as_they_are(serving: Serving) -> None:
    with serving.http() as http:
        described = http.get("/openapi.json").json()
        told = http.post("/v1/chat/completions", json={"model": "tiny"}).json()["error"]
    responses = [one["responses"] for path in described["paths"].values() for one in path.values()]
    assert all({"4XX", "5XX"} <= one.keys() and "422" not in one for one in responses)
    (reference,) = {
        one[status]["content"]["application/json"]["schema"]["$ref"] for one in responses for status in ("4XX", "5XX")
    }
    facts = described["components"]["schemas"]["ErrorFacts"]
    assert reference.endswith("/ErrorBody")
    assert told.keys() == facts["properties"].keys() == set(facts["required"])
