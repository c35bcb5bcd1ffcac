"""A line with a delay and a rate, in front of a server: what a far registry is like.

A relay rather than the kernel's network emulation, which many kernels are built without. All
connections share the rate downwards; every connection pays the delay once when it is opened, and
every answer pays it again. A client 10.231.0.N arrives at the server as 127.0.0.N, so that the
server's log still tells clients apart. Standard library only: run by path.
"""

import argparse
import asyncio
from contextlib import suppress

BLOCK = 16 * 1024
WAITING_BLOCKS = 32


class Line:
    """When bytes that come in now are out at the far end."""

    def __init__(self, delay: float, rate: int) -> None:
        self.delay = delay
        self._rate = rate
        self._free_at = 0.0

    def arrival(self, now: float, size: int) -> float:
        self._free_at = max(now, self._free_at)
        if self._rate:
            self._free_at += size / self._rate
        return self._free_at + self.delay


async def serve(listen: str, to: str, line: Line) -> None:
    host, _, port = listen.partition(":")
    to_host, _, to_port = to.partition(":")

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = writer.get_extra_info("peername")[0]
        source = ("127.0.0." + client.rpartition(".")[2], 0)
        try:
            await asyncio.sleep(line.delay)
            far_reader, far_writer = await asyncio.open_connection(
                to_host, int(to_port), local_addr=source
            )
        except OSError:
            writer.transport.abort()
            return
        try:
            async with asyncio.TaskGroup() as group:
                up = group.create_task(pump(reader, far_writer))
                await delayed(far_reader, writer, line)
                up.cancel()
        except* OSError:
            pass
        finally:
            for end in (far_writer, writer):
                end.transport.abort() if end is far_writer else end.close()

    async with await asyncio.start_server(relay, host, int(port)) as server:
        await server.serve_forever()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while block := await reader.read(BLOCK):
        writer.write(block)
        await writer.drain()
    with suppress(OSError):
        writer.write_eof()


async def delayed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: Line) -> None:
    """Hand on what is read when the line lets it arrive; few blocks are on their way at once."""
    clock = asyncio.get_running_loop().time
    on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(WAITING_BLOCKS)

    async def read() -> None:
        while True:
            block = await reader.read(BLOCK)
            await on_the_way.put((line.arrival(clock(), len(block)), block))
            if not block:
                return

    async with asyncio.TaskGroup() as group:
        reading = group.create_task(read())
        try:
            while True:
                at, block = await on_the_way.get()
                await asyncio.sleep(at - clock())
                if not block:
                    return
                writer.write(block)
                await writer.drain()
        finally:
            reading.cancel()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    parser.add_argument("--to", required=True)
    parser.add_argument("--delay", type=float, required=True, help="seconds")
    parser.add_argument("--bytes-per-second", type=int, required=True)
    args = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(args.listen, args.to, Line(args.delay, args.bytes_per_second)))


if __name__ == "__main__":
    main()
