"""The program of one process of a `ProcessPool`."""

import os
import threading
import traceback
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any


def serve(descriptor: int) -> None:
    """Do tasks that come over a connection, until it ends. Never returns.

    The first message has the arguments of an `Encoder`. A thread receives, so that the writer never waits for a task
    that is being done; and when the writer is gone, or what it sends cannot be read, it ends the process in the midst
    of one.
    """
    connection: Connection[Any, Any] = Connection(descriptor)
    messages: SimpleQueue[Any] = SimpleQueue()

    def receive() -> None:
        try:
            while True:
                messages.put(connection.recv())
        except EOFError:
            os._exit(0)
        except BaseException:  # noqa: BLE001 - else the writer would wait for an answer for ever
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=receive, daemon=True).start()
    from m3runtime.writing.encoders.encoder import Encoder  # loads torch, while messages come

    encoder = Encoder(*messages.get())
    while True:
        connection.send(encoder.attempt(messages.get()))
