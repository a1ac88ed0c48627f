"""Keys: who may read, who may write, and that nobody else learns them."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from m3runtime.config.serve import ServeConfig
from m3runtime.errors import ConfigError
from m3runtime.serve.keys import Keys
from m3runtime.serve.server import check_address
from tests.serve.serving import Serving, tiny

READ, WRITE = "read-key-1234", "write-key-5678"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server with a key to read and a key to write."""
    with tiny(tmp_path_factory.mktemp("keys"), {"M3_KEYS": f"read:{READ}, write:{WRITE}"}) as one:
        yield one


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer wrong-key-1234", f"Basic {READ}", READ, f"Bearer {READ}x", "Bearer \xe9"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/chat/completions", "/nothing"])
def test_without_a_valid_key_nothing_is_answered(locked: Serving, authorization: str, path: str) -> None:
    with locked.http("") as client:
        response = client.post(path, headers={"Authorization": authorization.encode("latin-1")}, content=b"{")
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", [READ, WRITE])
def test_both_keys_read(locked: Serving, key: str) -> None:
    with locked.http(key) as client:
        assert client.get("/v1/models").status_code == 200


def test_health_needs_no_key(locked: Serving) -> None:
    with locked.http("") as client:
        assert client.get("/health/live").json() == {"status": "ok"}
        assert client.get("/health/ready").status_code == 200


def test_keys_are_neither_logged_nor_kept(locked: Serving, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), locked.http(READ) as client:
        client.get("/v1/models", params={"key": READ})
    lines = [record for record in caplog.records if record.name == "m3runtime.serve"]
    assert lines
    assert READ not in str([vars(line) for line in lines])
    assert READ not in repr(locked.server.served.keys)


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who may read\nread {READ}\n\nboth-key-9999\n")
    keys = Keys.load(file, {"M3_KEYS": f"write:{WRITE},"})
    assert [keys.access(key) for key in (READ, "both-key-9999", WRITE, "", "read")] == [
        "read",
        "write",
        "write",
        None,
        None,
    ]
    assert not Keys.load(None, {}).needed


@pytest.mark.parametrize("text", ["read short", "admin secret-key-1", "read two words here", "read sécret-key-1"])
def test_a_bad_entry_is_named_by_its_line_and_not_shown(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"\n{text}\n")
    with pytest.raises(ConfigError, match="line 2") as caught:
        Keys.load(file, {})
    assert text.split()[-1] not in str(caught.value)


def test_a_file_without_keys_locks_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(ConfigError, match="has no key"):
        Keys.load(tmp_path / "keys", {})
    with pytest.raises(ConfigError, match="cannot read"):
        Keys.load(tmp_path / "missing", {})


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_other_machines_need_keys(address: str) -> None:
    limits = ServeConfig(address=address)
    with pytest.raises(ConfigError, match="--no-keys"):
        check_address(limits, has_keys=False, without_keys=False)
    check_address(limits, has_keys=True, without_keys=False)
    check_address(limits, has_keys=False, without_keys=True)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_none(address: str) -> None:
    check_address(ServeConfig(address=address), has_keys=False, without_keys=False)
