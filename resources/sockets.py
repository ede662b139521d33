"""Listening TCP sockets."""

import errno
import socket

from resources.errors import ConfigError

_BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; `::` stands for IPv6 and IPv4. Raises ConfigError."""
    try:
        if host == "::" and not _has_ipv6():
            host = "0.0.0.0"
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=host == "::")
    except OSError as error:
        reason = "another process is listening there" if error.errno == errno.EADDRINUSE else str(error)
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {reason}. Choose another port, or stop that process."
        ) from error


def http_url(host: str, port: int) -> str:
    """The URL of a server, with an IPv6 host in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _has_ipv6() -> bool:
    """Whether IPv6 is enabled on this machine or pod; Python's build flag does not tell."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True
