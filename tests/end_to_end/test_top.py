"""``m3 top`` beside a process that serves its metrics."""

import socket

from m3runtime import Config, Runtime
from m3runtime.config.yaml_file import parse_yaml
from tests.end_to_end.commands import Place


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def test_a_runtime_that_is_told_so_can_be_watched_until_it_is_closed(written: Place) -> None:
    written.configure(metrics={"port": free_port()})
    with Runtime.open(Config.load(written.file, environ={}), read_only=True) as runtime:
        with runtime.stream() as stream:
            recalled = stream.recall("What does the harbour lamp burn?", wait=True)
        assert written.m3("top", "--json").json["recall_memories"] == len(recalled) > 0
    line = written.m3("top", "--once").complaint
    assert "nothing answers at 127.0.0.1:" in line
    port = parse_yaml(written.file.read_text(), "m3.yaml")["metrics"]["port"]
    assert f"`m3 chat --set metrics.port={port}`" in line  # the port that was asked
