"""Clients that people use, and a fuzzer, against a running server; `make test-serve` installs them aside."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.serving import FUEL, Serving, smollm2, tiny

pytestmark = pytest.mark.clients

PYTHON = Path(os.environ.get("M3_CLIENTS", ".venv-clients/bin/python")).absolute()
"""The interpreter of an environment that has them."""
LANGCHAIN = """
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
options = {"model": "smollm2", "base_url": base, "api_key": "none", "max_retries": 0}
chat = ChatOpenAI(**options, temperature=0)
answer = chat.invoke(question)
assert answer.content == "".join(chunk.content for chunk in chat.stream(question))
assert "walnut" in answer.content
assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
assert [one.content for one in chat.batch([question] * 3)] == [answer.content] * 3
cited = ChatOpenAI(**options, use_responses_api=True).invoke(question).content[0]
assert "walnut" in cited["text"]
assert {one["type"] for one in cited["annotations"]} == {"url_citation", "file_citation"}
assert OpenAIEmbeddings(**options, check_embedding_ctx_length=False).embed_query("lamp")
"""
LLAMA_INDEX = """
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
options = {"model": "smollm2", "api_base": base, "api_key": "none", "max_tokens": 24, "temperature": 0}
messages = [ChatMessage(role="user", content=question)]
chat = OpenAILike(**options, is_chat_model=True)
answer = chat.chat(messages).message.content
assert answer == "".join(piece.delta for piece in chat.stream_chat(messages))
assert "walnut" in answer
assert OpenAILike(**options, is_chat_model=False).complete("The harbour lamp burns").text
"""
LITELLM = """
import os
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm
options = {"model": "openai/smollm2", "api_base": base, "api_key": "none", "max_tokens": 24, "temperature": 0}
messages = [{"role": "user", "content": question}]
answer = litellm.completion(**options, messages=messages)
pieces = litellm.completion(**options, messages=messages, stream=True)
assert answer.choices[0].message.content == "".join(piece.choices[0].delta.content or "" for piece in pieces)
assert "walnut" in answer.choices[0].message.content
assert answer.usage.prompt_tokens_details.cached_tokens > 0
"""


def run(*command: object) -> str:
    """The output of a command that succeeds, without the variables of this process that concern Python."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def real(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with smollm2(tmp_path_factory.mktemp("real"), smollm2_path) as serving:
        yield serving


@pytest.mark.real_model
@pytest.mark.parametrize("script", [LANGCHAIN, LLAMA_INDEX, LITELLM], ids=["langchain", "llama-index", "litellm"])
def test_a_client_asks_a_real_model_and_streams(real: Serving, script: str) -> None:
    run(PYTHON, "-c", f"base, question = {real.url + '/v1'!r}, {FUEL!r}\n{script}")


UNSUPPORTED = {
    "openai-chat": {"chat-tool-calling", "chat-image-input"},
    "open-responses": {"tool-calling", "image-input"},
}
"""Tests of llm-comply that ask for what is refused by name."""


@pytest.mark.parametrize("form", UNSUPPORTED)
def test_answers_comply_with_the_form(tmp_path: Path, form: str) -> None:
    """Where no memory is near enough: Open Responses knows no `file_citation`, which OpenAI's types have."""
    with tiny(tmp_path, min_score=1.0, generate={"max_new_tokens": 200, "stop": list("aeiou")}) as serving:
        found = comply(serving.url, form)
    assert found.keys() == UNSUPPORTED[form], found


def comply(url: str, form: str) -> dict[str, list[str]]:
    """The tests of llm-comply that fail, and why."""
    command = [PYTHON.with_name("llm-comply"), "-u", f"{url}/v1", "-k", "none", "-m", "tiny"]
    done = subprocess.run([*command, "--format", form, "--json"], capture_output=True, text=True, check=False)
    results = json.loads(done.stdout)["results"]
    return {one["id"]: one["errors"] for one in results if one["status"] == "failed"}


@pytest.mark.timeout(3600)
def test_no_request_is_answered_with_5xx(serving: Serving, tmp_path: Path) -> None:
    settings = tmp_path / "schemathesis.toml"
    settings.write_text('[parameters]\n"body.model" = "tiny"\n')
    options = ["--checks", "not_a_server_error", "--max-examples", 60, "--phases", "coverage,fuzzing"]
    fuzzer = PYTHON.with_name("schemathesis")
    assert "passed" in run(fuzzer, "--config-file", settings, "run", f"{serving.url}/openapi.json", *options)
