"""Bytes from a file to a socket without a copy (sendfile(2)).

uvloop has no ``sendfile``, so this sends past the transport. The rule that makes it safe: only
while the transport has nothing left to send and nobody waits; what the socket does not take
at once goes through the transport.
"""

from __future__ import annotations

import asyncio
import os
import socket


class FileSender:
    """The socket of one connection, under a descriptor of its own.

    Raises `ConnectionResetError` if the connection is gone.
    """

    __slots__ = ("_socket", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        theirs = transport.get_extra_info("socket")
        if theirs is None or theirs.fileno() < 0:
            raise ConnectionResetError("the client has left")
        self._socket = socket.socket(fileno=os.dup(theirs.fileno()))
        self._socket.setblocking(False)

    def close(self) -> None:
        """Let the descriptor go: the connection ends only when nobody has one."""
        self._socket.close()

    def send(self, head: bytes, fd: int, start: int, count: int) -> bool:
        """Send *head* and *count* bytes of the file from *start* on; the bytes must be there.

        False if nothing was sent. What the socket does not take is read, and left to the transport.
        """
        transport = self._transport
        if transport.get_write_buffer_size():
            return False
        try:
            # More follows (tcp(7)): head and body share their packets.
            if self._socket.send(head, socket.MSG_MORE) != len(head):
                transport.abort()  # A few hundred bytes into an empty buffer: never seen.
                return True
        except OSError:
            return False
        stop = start + count
        try:
            while start < stop:
                sent = os.sendfile(self._socket.fileno(), fd, start, stop - start)
                if not sent:
                    break
                start += sent
        except BlockingIOError:
            pass
        except OSError:
            transport.abort()
            return True
        if start < stop:
            rest = os.pread(fd, stop - start, start)
            if len(rest) == stop - start:
                transport.write(rest)
            else:
                transport.abort()
        return True

    def send_some(self, fd: int, start: int, stop: int) -> int:
        """Send what the socket takes of these bytes and return how many, 0 if none.

        The transport must have nothing left to send. Raises `OSError` if the client is gone.
        """
        try:
            return os.sendfile(self._socket.fileno(), fd, start, stop - start)
        except BlockingIOError:
            return 0

    async def writable(self) -> None:
        """Return when the socket takes more, or the client is gone."""
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        # Its own descriptor: the loop allows nobody to watch that of a transport.
        loop.add_writer(self._socket.fileno(), _settle, ready)
        try:
            await ready
        finally:
            loop.remove_writer(self._socket.fileno())


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
