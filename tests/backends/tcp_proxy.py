"""A proxy before a TCP server that delays, cuts and spoils what the server answers."""

import contextlib
import socket
import threading
import time
from typing import Self


class TcpProxy:
    """Forwards connections on ``port`` to another port. Its attributes may change at any moment."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.delay = 0.0
        """Seconds before each piece of an answer."""
        self.latency = 0.0
        """Seconds before the first piece of an answer to what was sent since the last one."""
        self.cut: int | None = None
        """Bytes of answers that a connection gets before it is closed; None: all."""
        self.spoil: tuple[bytes, bytes] | None = None
        """Bytes in answers, and what to put in their place."""
        self.refuse = False
        """Close new connections at once."""
        self.answered = 0
        """Requests that were answered, of clients that wait for an answer before the next request."""
        self._counting = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._open: set[socket.socket] = set()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def drop(self) -> None:
        """Close all connections."""
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._accepting.join()
        self.drop()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            if self.refuse:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.close()
                continue
            self._open |= {client, server}
            asked = threading.Event()
            for one, other, answers in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._forward, args=(one, other, answers, asked), daemon=True).start()

    def _forward(self, one: socket.socket, other: socket.socket, answers: bool, asked: threading.Event) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while piece := one.recv(1 << 16):
                if not answers:
                    asked.set()
                else:
                    if asked.is_set():
                        asked.clear()
                        with self._counting:
                            self.answered += 1
                        time.sleep(self.latency)
                    if self.delay:
                        time.sleep(self.delay)
                    if self.spoil is not None:
                        piece = piece.replace(*self.spoil)
                    if self.cut is not None and sent + len(piece) > self.cut:
                        other.sendall(piece[: max(0, self.cut - sent)])
                        break
                other.sendall(piece)
                sent += len(piece)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            self._open.discard(end)
            if end is one:
                end.close()
