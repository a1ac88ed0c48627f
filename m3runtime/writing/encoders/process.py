"""The program of one process of a `ProcessPool`."""

import os
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any


def serve(descriptor: int) -> None:
    """Do tasks that come over a connection, until it ends. Never returns.

    The first message has the arguments of an `Encoder`. A thread receives, so that the writer never waits for a task
    that is being done; and when the writer is gone, it ends the process in the midst of one.
    """
    connection: Connection[Any, Any] = Connection(descriptor)
    messages: SimpleQueue[Any] = SimpleQueue()

    def receive() -> None:
        try:
            while True:
                messages.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    from m3runtime.writing.encoders.encoder import Encoder  # loads torch, while messages come

    encoder = Encoder(*messages.get())
    while True:
        connection.send(encoder.attempt(messages.get()))
