"""The address of a server: taken before the models are loaded, and open once they are."""

from __future__ import annotations

import errno
import socket
import sys

from shadowpeft.errors import ConfigError

_BACKLOG = 2048
"""Connections that wait to be taken, as uvicorn has it."""
_ELSEWHERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""What a machine without IPv6 says of ``::1``, which ``localhost`` means beside 127.0.0.1."""


class Listener:
    """The sockets of a host and a port.

    Args:
        host: a name or an address of this machine; ``0.0.0.0`` and ``::`` are all of them. port: 1 to 65535.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.sockets: list[socket.socket] = []

    @property
    def url(self) -> str:
        """Where clients find the server."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    def bind(self) -> None:
        """Take every address of the host; connections are refused until :meth:`listen`.

        Raises:
            ConfigError: if one is taken, or none is an address of this machine.
        """
        absent: OSError | None = None
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, address in found:
                try:
                    self._bind(family, kind, protocol, address)
                except OSError as error:
                    if error.errno not in _ELSEWHERE:
                        raise
                    absent = error
        except OSError as error:
            self.close()
            raise self._refused(error) from error
        if absent is not None and not self.sockets:
            raise self._refused(absent) from absent

    def listen(self) -> None:
        """Take connections; they wait until somebody serves them.

        Raises:
            ConfigError: if another server has begun to listen there since :meth:`bind`.
        """
        try:
            for each in self.sockets:
                each.listen(_BACKLOG)
        except OSError as error:
            self.close()
            raise self._refused(error) from error

    def close(self) -> None:
        """Give the addresses back."""
        while self.sockets:
            self.sockets.pop().close()

    def _bind(self, family: int, kind: int, protocol: int, address: tuple[object, ...]) -> None:
        made = socket.socket(family, kind, protocol)
        self.sockets.append(made)
        try:
            if sys.platform != "win32":  # where the option lets two servers share a port
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind(address)
        except OSError:
            self.sockets.remove(made)
            made.close()
            raise

    def _refused(self, error: OSError) -> ConfigError:
        if error.errno == errno.EADDRINUSE:
            return ConfigError(
                f"port {self.port} of {self.host} is taken by another program; choose another with --port, or end that one"
            )
        if error.errno == errno.EACCES:
            return ConfigError(f"port {self.port} is not for this user to take ({error.strerror}); choose --port 1024 or above")
        return ConfigError(
            f"--host is '{self.host}' but must be an address of this machine ({error.strerror or error}); give one, 127.0.0.1 "
            "for this machine alone, or 0.0.0.0 for all its addresses"
        )
