"""A relay in front of a peer that damages what it carries: one flipped bit in every n-th blob body.

Requests and everything else pass as they are, so that the peer's own checks of who asks still hold.
With `--every 0` it is honest; with `--delay` it is slow to answer. Writes a line for each flipped
bit. Standard library only: run by path.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import suppress

BLOCK = 64 * 1024
MAX_HEAD = 64 * 1024
SMALLEST = 512
"""Shorter bodies are talk between nodes, not content."""


class Damage:
    """Decides which bodies are damaged, and counts them."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._bodies = 0

    def offset(self, head: bytes, size: int) -> int | None:
        """Where to flip a bit in a body of *size* bytes, or None."""
        kind = field(head, b"content-type")
        is_content = kind.startswith((b"application/octet-stream", b"multipart/byteranges"))
        if not is_content or size < SMALLEST or head.split(b" ", 2)[1] not in (b"200", b"206"):
            return None
        self._bodies += 1
        if not self._every or self._bodies % self._every:
            return None
        sys.stdout.write(f"flipped a bit at {size // 2} of {size}\n")
        sys.stdout.flush()
        return size // 2


def field(head: bytes, name: bytes) -> bytes:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip().lower()
    return b""


async def body(reader: asyncio.StreamReader, head: bytes) -> AsyncIterator[bytes]:
    """Yield the body that follows *head*, framing included."""
    if field(head, b"transfer-encoding") == b"chunked":
        while True:
            line = await reader.readline()
            yield line
            size = int(line.split(b";")[0], 16)
            yield await reader.readexactly(size + 2)
            if not size:
                return
    left = int(field(head, b"content-length") or 0)
    while left:
        block = await reader.read(min(BLOCK, left))
        if not block:
            return
        left -= len(block)
        yield block


async def exchange(
    near: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    far: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    damage: Damage,
    delay: float,
) -> None:
    """Carry requests and answers, one after another, until one side closes."""
    while True:
        request = await near[0].readuntil(b"\r\n\r\n")
        far[1].write(request)
        async for block in body(near[0], request):
            far[1].write(block)
        await far[1].drain()
        answer = await far[0].readuntil(b"\r\n\r\n")
        await asyncio.sleep(delay)
        near[1].write(answer)
        if request.startswith(b"HEAD "):
            continue
        at = damage.offset(answer, int(field(answer, b"content-length") or 0))
        sent = 0
        async for block in body(far[0], answer):
            data = bytearray(block)
            if at is not None and sent <= at < sent + len(data):
                data[at - sent] ^= 1
            sent += len(data)
            near[1].write(data)
            await near[1].drain()


async def serve(listen: str, to: str, damage: Damage, delay: float) -> None:
    host, _, port = listen.partition(":")
    to_host, _, to_port = to.partition(":")

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        with suppress(OSError, EOFError, asyncio.LimitOverrunError):
            try:
                far = await asyncio.open_connection(to_host, int(to_port), limit=MAX_HEAD)
                ends.append(far[1])
                await exchange((reader, writer), far, damage, delay)
            finally:
                for end in ends:
                    end.transport.abort()

    async with await asyncio.start_server(relay, host, int(port), limit=MAX_HEAD) as server:
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    parser.add_argument("--to", required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    args = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(args.listen, args.to, Damage(args.every), args.delay))


if __name__ == "__main__":
    main()
