"""vLLM's own server, as docs/vllm.md starts it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from m3model.vllm.head import load_head
from m3model.vllm.wish import Head
from m3runtime.config.schema import Config

KEY = "none of your business"


@dataclass
class Plain:
    """A server that runs."""

    url: str
    client: OpenAI
    head: Head
    config: Path
    process: "subprocess.Popen[bytes]"


@contextmanager
def plain_server(config: Config, folder: Path, *more: str) -> Iterator[Plain]:
    """The commands of docs/vllm.md, with more arguments."""
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
        "--host": "127.0.0.1",
        "--port": port,
        "--api-key": KEY,
        "--middleware": "m3model.vllm.middleware.Memories",
        "--kv-transfer-config": json.dumps(connector),
    }
    flat = [str(one) for pair in arguments.items() for one in pair]
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            *flat,
            "--no-async-scheduling",
            "--enforce-eager",
            *more,
        ],
        env=env,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(900):  # a machine that does much else takes minutes
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                assert server.poll() is None
            time.sleep(1)
        else:
            pytest.fail("the server does not start")
        client = OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=300)
        yield Plain(url, client, load_head(file, block=32), file, server)
    finally:
        server.terminate()
        server.wait(60)
        with suppress(ProcessLookupError):  # of a server that was killed, engine and workers go on
            os.killpg(server.pid, signal.SIGKILL)
