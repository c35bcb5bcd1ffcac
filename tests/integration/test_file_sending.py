"""Files go out past the transport: the right bytes, in order, whatever the socket takes."""

import asyncio
import os
import socket

import pytest

from p2pcache.server.file_sending import FileSender

SIZE = 8 << 20
LOW_BUFFER = 8 << 10


@pytest.fixture
def data():
    return os.urandom(SIZE)


@pytest.fixture
def fd(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
async def connection():
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOW_BUFFER)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=near)
    reader, writer = await asyncio.open_connection(sock=far)
    yield transport, reader
    transport.abort()
    writer.close()


async def test_what_the_socket_does_not_take_follows_by_the_transport(connection, fd, data):
    transport, reader = connection
    sender = FileSender(transport)
    assert sender.send(b"head", fd, 10, 1 << 20)
    assert transport.get_write_buffer_size() > 0
    assert await reader.readexactly(4 + (1 << 20)) == b"head" + data[10 : 10 + (1 << 20)]
    sender.close()


async def test_nothing_is_sent_past_a_transport_that_has_something_to_send(connection, fd):
    transport, reader = connection
    sender = FileSender(transport)
    before = bytes(1 << 20)
    transport.write(before)
    assert not sender.send(b"head", fd, 0, 100)
    assert await reader.readexactly(len(before)) == before
    assert not transport.get_write_buffer_size()
    sender.close()


async def test_a_large_file_goes_out_as_fast_as_it_is_read(connection, fd, data):
    transport, reader = connection
    sender = FileSender(transport)

    async def send() -> None:
        position = 0
        while position < SIZE:
            if sent := sender.send_some(fd, position, SIZE):
                position += sent
            else:
                await sender.writable()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(send())
        assert await reader.readexactly(SIZE) == data
    sender.close()


async def test_a_client_that_leaves_ends_the_wait(connection, fd):
    transport, reader = connection
    sender = FileSender(transport)
    while sender.send_some(fd, 0, SIZE):
        pass

    async def leave() -> None:
        reader._transport.abort()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(leave())
        await sender.writable()
    with pytest.raises(OSError, match=r"[Pp]ipe|reset"):
        sender.send_some(fd, 0, SIZE)
    sender.close()


async def test_a_file_that_is_too_short_cuts_the_connection(connection, fd):
    transport, reader = connection
    sender = FileSender(transport)
    assert sender.send(b"head", fd, SIZE - 10, 100)
    assert transport.is_closing()
    sender.close()  # as `connection_lost` does: the last descriptor ends the connection
    async with asyncio.timeout(5):
        assert len(await reader.read()) <= 14
