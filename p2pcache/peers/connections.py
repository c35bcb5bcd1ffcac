"""Connections to peers: HTTP/1.1 (RFC 9112), one request at a time on each, kept for the next one.

Hides sockets, the pool and time limits. The rules: every wait ends; how many connections there are,
and how many requests wait for one, is bounded; a connection is used again only if all of its last
answer came, and nothing else did.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Final, Self, cast
from urllib.parse import urlsplit

from p2pcache.peers.answer import Answer

# A peer is a neighbour: one that does not answer a connection within a second is not there.
CONNECT_S: Final = 1.0
# For everything before a request can be sent: a free connection, its name's addresses, TLS.
_READY_S: Final = 2.0
# As our own servers, by default.
_IDLE_S: Final = 60.0
_CLOSE_S: Final = 1.0

_MAX_CONNECTIONS: Final = 128
# To all places together: each takes a descriptor here and there.
_MAX_IDLE: Final = 1024
_MAX_ASKING: Final = 4096
_MAX_ADDRESSES: Final = 4


@dataclass(frozen=True, slots=True)
class Place:
    """Where a peer is reached, the same for all of its URLs."""

    host: str
    port: int
    is_tls: bool

    @classmethod
    def of(cls, url: str) -> Place:
        """Return the place of a peer's *url*."""
        parts = urlsplit(url)
        is_tls = parts.scheme == "https"
        return cls(parts.hostname or "", parts.port or (443 if is_tls else 80), is_tls)


class Connections:
    """The connections of one node to its peers. An async context manager: leaving it ends them.

    At most *max_idle* are kept for later; beyond that those go that have been idle for longest.
    """

    def __init__(self, max_idle: int = _MAX_IDLE) -> None:
        self._pools: dict[Place, _Pool] = {}
        self._idle = _Idle(max_idle)
        self._is_closed = False
        self._none_left = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_closed = True
        for pool in list(self._pools.values()):
            for connection in list(pool.connections):
                connection.abort()
        if self._pools:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self._none_left.wait()

    async def ask(self, place: Place, request: bytes, patience_s: float) -> Answer:
        """Send *request*, a whole one with its body; return the answer once its head is there.

        The answer must be closed. A request may be sent twice, if the connection ended before any
        byte of an answer. Wherever the peer is silent for *patience_s*, it is given up. Raises
        `OSError`.
        """
        if self._is_closed:
            raise ConnectionRefusedError("this node is stopping")
        pool = self._pools.get(place)
        if pool is None:
            pool = self._pools[place] = _Pool(place, self._forget, self._idle)
        return await pool.ask(request, patience_s)

    def _forget(self, place: Place) -> None:
        self._pools.pop(place, None)
        if not self._pools:
            self._none_left.set()


class _Connection(asyncio.Protocol):
    """One connection. Its timer is for both: silence where there should be none, and idleness."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: _Pool) -> None:
        self.loop = loop
        self.is_paused = False
        self.is_open = False
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._patience_s = _IDLE_S
        self._heard_at = loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def send(self, request: bytes, patience_s: float) -> Answer:
        """Send *request*. From then on the peer may be silent for *patience_s*, no longer."""
        answer = self._answer = Answer(self, self._close)
        if self._transport is None:
            answer.fail(ConnectionResetError("it has closed the connection"))
        else:
            self._watch(patience_s)
            self._transport.write(request)
        return answer

    def rest(self) -> bool:
        """Wait for another request, if that is possible; else close the connection."""
        answer, self._answer = self._answer, None
        if self.is_open and answer is not None and answer.is_reusable and not self.is_paused:
            self._watch(_IDLE_S)
            return True
        self.abort()
        return False

    def _close(self) -> None:
        self._pool.take_back(self)

    def retire(self) -> None:
        """Close the connection, which is idle, to make room for others."""
        self._pool.let_go(self)
        self.abort()

    def abort(self) -> None:
        """Close the connection at once."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Read no further for now."""
        if self._transport is not None and not self._transport.is_closing() and not self.is_paused:
            self.is_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on. The peer was not silent meanwhile: nobody listened."""
        self.is_paused = False
        self._heard_at = self.loop.time()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True
        self._pool.connections.add(self)
        self._watch(_IDLE_S)

    def data_received(self, data: bytes) -> None:
        """Take some of the answer."""
        answer = self._answer
        if answer is None or answer.is_complete:
            self.abort()  # Nothing was asked.
            return
        self._heard_at = self.loop.time()
        if not answer.feed(data):
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._transport = None
        self.is_open = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pool.forget(self)
        if self._answer is not None:
            reason = "it closed the connection" if exc is None else str(exc) or type(exc).__name__
            self._answer.fail(ConnectionResetError(reason))

    # A request sets no timer if there is one that goes off early enough: then it is put off.

    def _watch(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._heard_at = self.loop.time()
        self._ring_at(self._heard_at + patience_s)

    def _ring_at(self, due: float) -> None:
        if self._timer is not None:
            if self._timer_at <= due:
                return
            self._timer.cancel()
        self._timer_at = due
        self._timer = self.loop.call_at(due, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self.loop.time()
        due = (now if self.is_paused else self._heard_at) + self._patience_s
        if due > now:
            self._ring_at(due)
            return
        if self._answer is not None:
            self._answer.fail(TimeoutError(f"nothing came for {self._patience_s:g} s"))
        self.abort()


class _Idle:
    """The connections of all pools that wait for a request, the longest idle first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._connections: dict[_Connection, None] = {}

    def add(self, connection: _Connection) -> None:
        """It is idle from now on, and perhaps another one is too much."""
        self._connections[connection] = None
        if len(self._connections) > self._limit:
            next(iter(self._connections)).retire()

    def remove(self, connection: _Connection) -> None:
        """It is used again, or gone."""
        del self._connections[connection]


class _Pool:
    """The connections to one place: at most so many requests are under way, the others wait."""

    def __init__(self, place: Place, on_empty: Callable[[Place], None], all_idle: _Idle) -> None:
        self.connections: set[_Connection] = set()
        self._place = place
        self._on_empty = on_empty
        self._idle: list[_Connection] = []
        self._all_idle = all_idle
        self._asking = 0
        self._slots = asyncio.Semaphore(_MAX_CONNECTIONS)

    async def ask(self, request: bytes, patience_s: float) -> Answer:
        if self._asking >= _MAX_ASKING:
            raise ConnectionRefusedError("too many requests to it wait here")
        self._asking += 1
        try:
            if self._slots.locked():
                async with asyncio.timeout(_READY_S):
                    await self._slots.acquire()
            else:
                await self._slots.acquire()
        except BaseException:
            self._done()
            raise
        try:
            return await self._ask(request, patience_s)
        except BaseException:
            self._slots.release()
            self._done()
            raise

    async def _ask(self, request: bytes, patience_s: float) -> Answer:
        """Ask on an idle connection, or a new one. Once more if it was closed without an answer.

        A server may close a connection just as a request comes in, and all of ours may be repeated
        (RFC 9110, section 9.2.2; claims as they are made).
        """
        may_repeat = True
        connection = self._take() or await self._connect()
        while True:
            answer = connection.send(request, patience_s)
            try:
                await answer.head()
            except ConnectionResetError:
                connection.abort()
                if not may_repeat or not answer.is_unanswered:
                    raise
            except BaseException:
                connection.abort()
                raise
            else:
                return answer
            may_repeat = False
            connection = await self._connect()

    async def _connect(self) -> _Connection:
        try:
            return await self._connected()
        except ValueError as error:  # UnicodeError for one: a name that cannot even be looked up
            raise ConnectionRefusedError(f"its name is none: {error}") from error

    async def _connected(self) -> _Connection:
        loop = asyncio.get_running_loop()
        place = self._place
        tls = await asyncio.to_thread(_tls_context) if place.is_tls else None
        failure: OSError | None = None
        async with asyncio.timeout(_READY_S):
            found = await loop.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
            for where in dict.fromkeys(item[4][:2] for item in found[:_MAX_ADDRESSES]):
                try:
                    async with asyncio.timeout(CONNECT_S):
                        _, connection = await loop.create_connection(
                            lambda: _Connection(loop, self),
                            str(where[0]),
                            int(where[1]),
                            ssl=tls,
                            server_hostname=place.host if tls else None,
                        )
                        return connection
                except OSError as error:
                    failure = error
        raise failure or ConnectionRefusedError("its name has no address")

    def take_back(self, connection: _Connection) -> None:
        """The answer that came by it is closed."""
        if connection.rest():
            self._idle.append(connection)
            self._all_idle.add(connection)
        self._slots.release()
        self._done()

    def forget(self, connection: _Connection) -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        self.let_go(connection)
        self._end_if_empty()

    def let_go(self, connection: _Connection) -> None:
        """No request goes by this connection any more."""
        if connection in self._idle:
            self._idle.remove(connection)
            self._all_idle.remove(connection)

    def _take(self) -> _Connection | None:
        """Take the connection that was used last: the others may end for being idle."""
        if not self._idle:
            return None
        connection = self._idle.pop()
        self._all_idle.remove(connection)
        return connection

    def _done(self) -> None:
        self._asking -= 1
        self._end_if_empty()

    def _end_if_empty(self) -> None:
        if not self._asking and not self.connections:
            self._on_empty(self._place)


@cache
def _tls_context() -> ssl.SSLContext:
    """Who is believed to be a peer over TLS: what this machine believes. Reads files."""
    return ssl.create_default_context()
