"""vLLM's own server with the connector, a chat template that begins with the head, and clients of OpenAI's library."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import InternalServerError, OpenAI

from m3model.adapter import TransformersAdapter
from m3model.vllm.head import load_head
from m3model.vllm.wish import Head
from m3runtime.config.schema import Config, GenerateConfig
from m3runtime.runtime import Runtime

pytestmark = pytest.mark.vllm


@dataclass
class Plain:
    client: OpenAI
    head: Head
    config: Path
    folder: Path


@pytest.fixture(scope="module")
def plain(config: Config, adapter: TransformersAdapter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    """The commands of docs/vllm.md."""
    folder = tmp_path_factory.mktemp("plain")
    file = folder / "m3.yaml"
    file.write_text(json.dumps(json.loads(config.model_dump_json(exclude_unset=True))))  # JSON is YAML
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    template = folder / "chat.jinja"
    command = [sys.executable, "-m", "m3model.vllm.head", "--config", file, "--block-size", "32"]
    subprocess.run([*command, "--chat-template", template], check=True, env=env, stdout=subprocess.DEVNULL)
    connector = {
        "kv_connector": "MemoryConnector",
        "kv_connector_module_path": "m3model.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"config": str(file)},
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = {
        "--model": config.model.path,
        "--served-model-name": "lamp",
        "--dtype": "float32",
        "--block-size": 32,
        "--max-model-len": 2048,
        "--chat-template": template,
        "--port": port,
        "--kv-transfer-config": json.dumps(connector),
    }
    flat = [str(one) for pair in arguments.items() for one in pair]
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flat, "--no-async-scheduling", "--enforce-eager"],
        env=env,
    )
    try:
        for _ in range(300):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                assert server.poll() is None
            time.sleep(1)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
        yield Plain(client, load_head(file, block=32), file, folder)
    finally:
        server.terminate()
        server.wait(60)


def test_a_prompt_of_tokens(plain: Plain, config: Config, adapter: TransformersAdapter) -> None:
    prompt = adapter.render("What does the harbour lamp burn?", "question")
    ids = plain.head.ids + adapter._prompt_ids([prompt], sink=True)[0]
    params: Any = {"kv_transfer_params": {"m3": {"query": prompt.query}}}
    found = plain.client.completions.create(model="lamp", prompt=ids, max_tokens=24, temperature=0, extra_body=params)
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
    found = plain.client.chat.completions.create(model="lamp", messages=asked, max_tokens=24, temperature=0)
    [first, *_] = found.kv_transfer_params["m3"]["reads"][0]["memories"]  # type: ignore[attr-defined]
    assert first["id"] == best.id
    parts = plain.client.chat.completions.create(
        model="lamp", messages=asked, max_tokens=24, temperature=0, stream=True
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts) == found.choices[0].message.content


def test_a_refused_request_leaves_the_server_alive(plain: Plain) -> None:
    params: Any = {"kv_transfer_params": {"m3": {"ids": [999_999]}}}
    for prompt in ([*plain.head.ids, 100, 200], [100, 200, 300]):
        with pytest.raises(InternalServerError):
            plain.client.completions.create(model="lamp", prompt=prompt, max_tokens=4, extra_body=params)
    found = plain.client.completions.create(model="lamp", prompt=[100, 200, 300], max_tokens=4)
    assert found.choices[0].text
