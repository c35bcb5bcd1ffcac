"""The sockets. Another process may listen on the same addresses at the same time.

That is what makes a restart without a gap: the new process listens, is ready, and only then is the
old one told to stop; it takes no more connections and finishes what it has begun (SO_REUSEPORT,
socket(7)).
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from aiohttp import web

from p2pcache.config import Address
from p2pcache.core.errors import ConfigError

_BACKLOG: Final = 1024


class Listener:
    """One address, and the server that answers there.

    Listens from the start, so that the port is known; connections are accepted once it is opened.
    Raises `ConfigError` if the address cannot be had.
    """

    def __init__(self, address: Address) -> None:
        try:
            self._socket = _listening_socket(address)
        except OSError as error:
            raise ConfigError([f"cannot listen on {address}: {error.strerror}"]) from error
        self.port: int = self._socket.getsockname()[1]
        """The port in use: the one asked for, or the one that was free if that was 0."""
        self.address = Address(address.host, self.port)
        self._web_server: web.Server | None = None
        self._server: asyncio.Server | None = None

    async def open(self, server: web.Server) -> None:
        """Have *server* answer whoever connects."""
        self._web_server = server
        self._server = await asyncio.get_running_loop().create_server(
            server, sock=self._socket, backlog=_BACKLOG
        )

    def release(self) -> None:
        """Let go of an address at which nobody has answered yet."""
        if self._server is None:
            self._socket.close()

    def stop_accepting(self) -> None:
        """Take no more connections, and close those that are idle."""
        self.release()
        if self._server is not None and self._web_server is not None:
            self._server.close()
            self._web_server.pre_shutdown()

    async def close(self, timeout_s: float) -> None:
        """Wait for the answers under way, at most *timeout_s*; cut what is left."""
        self.stop_accepting()
        if self._web_server is not None:
            await self._web_server.shutdown(timeout_s)


def _listening_socket(address: Address) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.setblocking(False)
        listening.bind(where)
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening
