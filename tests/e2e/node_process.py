"""One p2pcache process on loopback, and clients that write HTTP byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from p2pcache.config import interpreter

READY_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Ports:
    """Where a node listens: for clients that name the registry, for those that do not, …"""

    mirror: int
    mirror_for: int
    peers: int
    status: int

    @classmethod
    def free(cls) -> Self:
        """Ports that nothing listened on just now."""
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(4)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            return cls(*(each.getsockname()[1] for each in sockets))


@dataclass(slots=True)
class NodeProcess:
    """A running ``p2pcache serve``."""

    process: asyncio.subprocess.Process
    ports: Ports
    log: Path

    async def until_ready(self) -> None:
        """Return once ``/readyz`` answers 200."""
        async with asyncio.timeout(READY_S):
            while True:
                assert self.process.returncode is None, self.log.read_text()
                with contextlib.suppress(OSError, EOFError):
                    if (await ask(self.ports.status, "GET /readyz HTTP/1.1")).status == 200:
                        return
                await asyncio.sleep(0.02)

    async def stop(self) -> int:
        """Tell it to end; return its exit status."""
        self.process.terminate()
        async with asyncio.timeout(40):
            return await self.process.wait()

    async def kill(self) -> None:
        """End it without a chance to do anything."""
        self.process.kill()
        await self.process.wait()

    def errors(self) -> list[str]:
        """What it logged as errors, with their tracebacks."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [
            "\n".join(filter(None, (line["msg"], line.get("exception"))))
            for line in lines
            if line["level"] == "error"
        ]


async def start_node(
    store: Path, registry: str, upstream: str, ports: Ports, flags: Sequence[str] = ()
) -> NodeProcess:
    """Start a node that reads images of *registry* from *upstream*; it may not be ready yet."""
    log = store.with_suffix(".log")
    with log.open("ab") as stderr:
        process = await asyncio.create_subprocess_exec(
            interpreter(), "-m", "p2pcache", "serve",
            "--store", str(store),
            "--store-size", "1GiB",
            "--node-name", store.name,
            "--mirror-listen", f"127.0.0.1:{ports.mirror}",
            "--mirror-for", f"{registry}=127.0.0.1:{ports.mirror_for}",
            "--peer-listen", f"127.0.0.1:{ports.peers}",
            "--status-listen", f"127.0.0.1:{ports.status}",
            "--upstream", f"{registry}={upstream}",
            *flags,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=stderr,
        )  # fmt: skip
    return NodeProcess(process, ports, log)


@asynccontextmanager
async def node_process(
    store: Path, registry: str, upstream: str, *flags: str, ports: Ports | None = None
) -> AsyncIterator[NodeProcess]:
    """Run a node until the block is left."""
    node = await start_node(store, registry, upstream, ports or Ports.free(), flags)
    try:
        await node.until_ready()
        yield node
    finally:
        if node.process.returncode is None:
            await node.kill()


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it came over the wire. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes = field(repr=False)


class Wire:
    """A connection of its own, kept open between requests."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    @asynccontextmanager
    async def to(cls, port: int) -> AsyncIterator[Self]:
        """Connect to a port of this machine."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def send(self, line: str, *headers: str) -> None:
        """Send a request without a body."""
        text = "\r\n".join([line, "Host: 127.0.0.1", *headers, "", ""])
        self.writer.write(text.encode("latin-1"))

    async def head(self) -> Reply:
        """Read status and headers."""
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = [line.partition(":") for line in lines if line]
        assert len({name.lower() for name, _, _ in pairs}) == len(pairs), "a header appears twice"
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        return Reply(int(first.split()[1]), headers, b"")

    async def reply(self, *, has_body: bool = True) -> Reply:
        """Read a whole answer, whose length must be told."""
        head = await self.head()
        length = int(head.headers["content-length"]) if has_body else 0
        return Reply(head.status, head.headers, await self.reader.readexactly(length))

    async def ask(self, line: str, *headers: str) -> Reply:
        """Send a request and read its answer."""
        self.send(line, *headers)
        return await self.reply(has_body=not line.startswith("HEAD"))


async def until(condition: Callable[[], bool], *, limit_s: float = 20.0) -> None:
    """Return once *condition* holds."""
    async with asyncio.timeout(limit_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.02)


async def ask(port: int, line: str, *headers: str) -> Reply:
    """Ask one thing on a connection of its own."""
    async with asyncio.timeout(60), Wire.to(port) as wire:
        return await wire.ask(line, *headers)
