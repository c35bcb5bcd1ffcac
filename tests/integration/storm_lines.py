"""The lines between nodes of one process, and everything that can happen to them.

Every connection of a node, to another one or to the registry, passes a relay that knows who asks,
because each node has an address of its own on loopback. So a line between two of them can be
silent, as if packets were lost, or slow, and a node can be gone, as after a SIGKILL: connections
are reset at once and refused from then on.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Final
from weakref import WeakSet

from p2pcache.config import Address

REGISTRY_LINE: Final = -1
"""The registry, where lines are named by the nodes at their ends."""
_BLOCK: Final = 16 << 10
# So little waits in a line that what was sent is nearly what has arrived.
_BUFFER: Final = 64 << 10
# Of this process alone, and a port that is given to no connection.
_HOSTS: Final = f"127.{64 + (os.getpid() >> 8) % 64}.{os.getpid() % 256}."
_PORT: Final = 29901

_source: ContextVar[str] = ContextVar("_source", default="")


def ask_from(host: str) -> None:
    """Whatever this task, and those that it starts, connect to sees them at the address *host*."""
    _source.set(host)


@contextmanager
def _own_addresses() -> Iterator[None]:
    """Let what a node's tasks connect to see the node's own address."""
    loop = asyncio.get_running_loop()
    connect = loop.sock_connect

    async def sock_connect(sock: socket.socket, address: Any) -> None:
        if host := _source.get():
            sock.bind((host, 0))
        await connect(sock, address)

    loop.sock_connect = sock_connect  # type: ignore[method-assign]
    try:
        yield
    finally:
        loop.sock_connect = connect  # type: ignore[method-assign]


class Limit:
    """How much passes all the lines that share it."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._is_lifted = asyncio.Event()

    def lift(self) -> None:
        """There is none any more."""
        self._is_lifted.set()

    async def admit(self, size: int) -> None:
        """Wait until *size* bytes are through."""
        now = asyncio.get_running_loop().time()
        self._free_at = max(now, self._free_at) + size / self._bytes_per_s
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._free_at):
                await self._is_lifted.wait()


class Line:
    """One direction of asking: what *asker* opens to a server, and what flows over it."""

    def __init__(self, news: Callable[[], None]) -> None:
        self.passed = 0
        """Bytes that came back over it."""
        self.heads: list[str] = []
        """The requests that were made over it."""
        self.is_dead = False
        self.limits: list[Limit] = []
        self._news = news
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._ends: set[asyncio.WriteTransport] = set()

    def silence(self) -> None:
        """Nothing passes; nobody is told."""
        self._is_open.clear()

    def heal(self) -> None:
        """All passes as it should, what was held up too."""
        self._is_open.set()

    def kill(self) -> None:
        """What is open is reset, what is opened later too."""
        self.is_dead = True
        for end in list(self._ends):
            _reset(end)

    @contextmanager
    def carrying(self, *ends: asyncio.WriteTransport) -> Iterator[None]:
        """Carry a connection."""
        self._ends.update(ends)
        try:
            yield
        finally:
            self._ends.difference_update(ends)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hand on what comes, until it ends."""
        while block := await reader.read(_BLOCK):
            if block.startswith(b"GET "):
                self.heads.append(block.decode("latin-1"))
            await self.passage(len(block))
            writer.write(block)
            await writer.drain()
        await self._is_open.wait()
        writer.write_eof()

    async def carry_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hand on the answers."""
        while block := await reader.read(_BLOCK):
            await self.passage(len(block))
            writer.write(block)
            self.passed += len(block)
            self._news()
            await writer.drain()
        await self._is_open.wait()
        writer.write_eof()

    async def passage(self, size: int) -> None:
        """Wait until so much may pass."""
        for limit in self.limits:
            await limit.admit(size)
        await self._is_open.wait()


class Net:
    """The lines from every node to every other one and to the registry."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self._news = asyncio.Event()
        self._lines: dict[tuple[int, int], Line] = {}
        self._servers: dict[int, asyncio.Server] = {}
        self._targets: dict[int, tuple[str, int]] = {}
        self._dead: set[int] = set()
        self._transports: WeakSet[asyncio.WriteTransport] = WeakSet()
        self.ports: dict[int, int] = {}
        """Where a node, or the registry, is reached through the relay."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Net]:
        """Listen for everyone."""
        connections: set[asyncio.Task[None]] = set()
        for number in (REGISTRY_LINE, *range(self.nodes)):

            async def relay(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to: int = number
            ) -> None:
                task = asyncio.current_task()
                assert task is not None
                connections.add(task)
                self._transports.add(writer.transport)
                try:
                    await self._relay(to, reader, writer)
                except asyncio.CancelledError:
                    writer.transport.abort()  # the end of the test: asyncio's own task swallows it
                finally:
                    connections.discard(task)

            server = await asyncio.start_server(relay, "127.0.0.1", 0)
            self._servers[number] = server
            self.ports[number] = server.sockets[0].getsockname()[1]
            self._targets[number] = self.host(number), _PORT
        try:
            with _own_addresses():
                yield self
        finally:
            for server in self._servers.values():
                server.close()
            for task in list(connections):
                task.cancel()
            if connections:
                await asyncio.wait(connections, timeout=5)
            for transport in self._transports:
                transport.abort()  # some still had something to send
            await asyncio.sleep(0)  # they are closed in the loop's next round

    def host(self, number: int) -> str:
        """The address that node *number* asks from."""
        return f"{_HOSTS}{number + 2}"

    def address(self, number: int) -> Address:
        """The address that node *number* is known by."""
        return Address("127.0.0.1", self.ports[number])

    def behind(self, number: int) -> Address:
        """The address that node *number* has to listen on."""
        return Address(*self._targets[number])

    def lead_to_registry(self, address: str) -> None:
        """The registry listens on *address*."""
        host, _, port = address.rpartition(":")
        self._targets[REGISTRY_LINE] = host, int(port)

    def line(self, asker: int, to: int) -> Line:
        """The line over which *asker* asks *to*."""
        if (asker, to) not in self._lines:
            line = self._lines[asker, to] = Line(self._news.set)
            line.is_dead = bool({asker, to} & self._dead)
        return self._lines[asker, to]

    def lines(self, number: int) -> Iterator[Line]:
        """All lines of one node."""
        for other in (REGISTRY_LINE, *range(self.nodes)):
            if other != number:
                yield self.line(number, other)
                if other != REGISTRY_LINE:
                    yield self.line(other, number)

    def between(self, some: Iterable[int], others: Collection[int]) -> Iterator[Line]:
        """All lines between two groups."""
        for one in some:
            for other in others:
                yield self.line(one, other)
                yield self.line(other, one)

    def bound(self, number: int, bytes_per_s: float) -> Limit:
        """All lines of one node together are so slow from now on."""
        limit = Limit(bytes_per_s)
        for line in self.lines(number):
            line.limits.append(limit)
        return limit

    def kill(self, number: int) -> None:
        """As if the process were gone: everything is reset, and refused from now on."""
        self._dead.add(number)
        self._servers[number].close()
        for line in self.lines(number):
            line.kill()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once *condition* holds, which is looked at whenever something has passed."""
        async with asyncio.timeout(30):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def _relay(
        self, to: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        asker = int(writer.get_extra_info("peername")[0].rpartition(".")[2]) - 2
        line = self.line(asker, to)
        if line.is_dead:
            _reset(writer.transport)
            return
        try:
            connection = await self._connected(to)
        except OSError:
            _reset(writer.transport)
            return
        far_reader, far_writer = await asyncio.open_connection(sock=connection, limit=_BUFFER)
        self._transports.add(far_writer.transport)
        ends = writer.transport, far_writer.transport
        for end in ends:
            end.set_write_buffer_limits(_BUFFER)
        try:
            with line.carrying(*ends):
                async with asyncio.TaskGroup() as group:
                    asking = group.create_task(line.carry(reader, far_writer))
                    await line.carry_back(far_reader, writer)
                    asking.cancel()
        except* OSError:  # one of both is gone: so will be the other
            for end in ends:
                end.abort()
        finally:
            for end in ends:
                end.close()

    async def _connected(self, to: int) -> socket.socket:
        """Connect to a node, which may not listen yet: they all start at once."""
        async with asyncio.timeout(10):
            while True:
                connection = socket.socket()
                connection.setblocking(False)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
                try:
                    await asyncio.get_running_loop().sock_connect(connection, self._targets[to])
                except ConnectionRefusedError:
                    connection.close()
                    if to in self._dead:
                        raise
                else:
                    return connection
                await asyncio.sleep(0.01)


def _reset(end: asyncio.BaseTransport) -> None:
    """Drop a connection with a TCP reset, as a kernel does whose process is gone."""
    connection: socket.socket | None = end.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        with suppress(OSError):
            linger = (1).to_bytes(4, "little") + bytes(4)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    assert isinstance(end, asyncio.WriteTransport)
    end.abort()
