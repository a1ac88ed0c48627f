"""`condensed`: the model writes the question that a message of a conversation is searched by."""

from pathlib import Path

import pytest

from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.condensing import condensed
from tests.model.families import make_adapter
from tests.serve.serving import tiny

MESSAGES = [
    {"role": "user", "content": "what does the harbour lamp burn?"},
    {"role": "assistant", "content": "walnut oil"},
    {"role": "user", "content": "and\nthe owl?"},
]


def test_a_message_is_written_anew_and_no_other_prompt_changes() -> None:
    adapter = make_adapter()
    try:
        alone, following = adapter.chat(MESSAGES[:1]), adapter.chat(MESSAGES)
        first, second, third = condensed(adapter, [alone, following, Prompt("plain")])
        assert (first, third) == (alone, Prompt("plain"))
        assert second.query != following.query
        assert second.query
        assert second.query == second.query.strip()
        assert "\n" not in second.query
        assert (second.text, second.context) == (following.text, following.context)
        assert condensed(adapter, [following]) == [second]
        other = adapter.chat([{"role": "user", "content": "the ferry"}, *MESSAGES[1:]])
        assert condensed(adapter, [other])[0].query != second.query  # it reads the earlier messages
        assert condensed(adapter, []) == []
    finally:
        adapter.close()


def test_a_server_searches_by_what_the_model_wrote(tmp_path: Path) -> None:
    with tiny(tmp_path, condense=True) as serving:
        served = serving.server.served
        plain = served.adapter.chat(MESSAGES)
        scores = []
        for prompt in (plain, *condensed(served.adapter, [plain])):
            with served.runtime.stream(served.adapter.dtype) as stream:
                (answer,) = served.adapter.generate([prompt], [stream], served.config.generate)
            scores.append(list(answer.chunks[0].scores))
        with serving.http() as client:
            body = {"model": serving.name, "messages": MESSAGES, "max_tokens": 1}
            message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        found = [one["score"] for one in message["memories"][:2]]  # those of the prompt
        assert found == pytest.approx(scores[1], abs=1e-3)
        assert found != pytest.approx(scores[0], abs=1e-3)
