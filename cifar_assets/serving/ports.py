"""Ports of this machine: taking one, and who holds it, for errors that a person can act on."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from resources.errors import ConfigError

_LISTENING = "0A"


def bind_address(host: str, port: int) -> socket.socket:
    """A TCP socket bound to the address; `::` stands for IPv4 too. Raises ConfigError."""
    try:
        if host == "::" and not _has_ipv6():
            host = "0.0.0.0"
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if host == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
    except OSError as error:
        hint = "another process listens there" if error.errno == errno.EADDRINUSE else str(error)
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {hint}. Choose another port, or end that process."
        ) from error
    return listener


def http_url(host: str, port: int) -> str:
    """The address of a server, with an IPv6 host in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _has_ipv6() -> bool:
    """Whether this machine or pod has IPv6 switched on, which a build of Python does not say."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def port_holder(port: int) -> int | None:
    """Process id of a listener on the port; None where there is none, or the system does not tell."""
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    for folder in Path("/proc").glob("[0-9]*"):
        if not inodes.isdisjoint(_open_files(folder / "fd")):
            return int(folder.name)
    return None


def command_line(pid: int) -> str | None:
    """The command a process runs, None where there is no such process or the system does not tell."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return None


def _open_files(folder: Path) -> Iterator[str]:
    """What a process's descriptors point to, as far as this process may know and while it is so."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                yield os.readlink(folder / name)


def _listening_inodes(port: int) -> set[str]:
    inodes: set[str] = set()
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(name).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == _LISTENING:
                inodes.add(f"socket:[{fields[9]}]")
    return inodes
