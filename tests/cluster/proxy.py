"""A TCP proxy on loopback that can simulate an outage of the server behind it."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator


class Proxy:
    """Passes bytes between clients and one server. During an outage, connections break and new ones are refused."""

    def __init__(self, host: str, port: int):
        self._server = (host, port)
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.num_refused = 0
        self._away = threading.Event()

    @classmethod
    @contextlib.contextmanager
    def before(cls, host: str, port: int) -> Iterator["Proxy"]:
        proxy = cls(host, port)
        threading.Thread(target=proxy._accept, daemon=True).start()
        try:
            yield proxy
        finally:
            proxy._away.set()
            proxy._listener.close()
            proxy._break_all()

    def be_away(self, seconds: float) -> None:
        """Returns when the outage is over."""
        self._away.set()
        self._break_all()
        time.sleep(seconds)
        self._away.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed at the end
            while True:
                client, _ = self._listener.accept()
                if self._away.is_set():
                    self.num_refused += 1
                    client.close()
                else:
                    threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, ValueError), socket.create_connection(self._server) as server:
            self._open |= {client, server}
            other = {client: server, server: client}
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    other[source].sendall(data)

    def _break_all(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._open.clear()
