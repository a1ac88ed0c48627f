"""``m3 serve`` as a process."""

import re
import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.end_to_end.commands import M3, environment


@contextmanager
def served(folder: Path, *arguments: str, **variables: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The address of a server that runs in a process."""
    command = [M3, "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, cwd=folder, env=environment() | variables, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        found = None
        while not found and (line := process.stderr.readline()):
            found = re.search(r"serving \S+ at (http://\S+)", line)
        assert found
        # Its log would fill the pipe.
        reader = threading.Thread(target=deque, args=(process.stderr, 0))
        reader.start()
        yield found[1], process
        process.kill()
        reader.join()
    finally:
        process.kill()
        process.communicate()
