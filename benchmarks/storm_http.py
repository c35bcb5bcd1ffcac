"""HTTP/1.1 as lean as Python gets it, for the clients of the storm: one connection, raw socket.

Hides heads, lengths and multipart bodies. The rule: bodies are read into memory that is there
already wherever that can be, and what has no length is an error. Standard library only.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

BUFFER: Final = 256 << 10
MAX_HEAD: Final = 64 << 10
# What containerd waits for a connection; then what the snapshotter's older releases wait for bytes.
DIAL_S: Final = 30.0
PATIENCE_S: Final = 300.0
_CONTENT_RANGE = re.compile(rb"bytes (\d+)-(\d+)/", re.IGNORECASE)

Span = tuple[int, int]


class Refused(Exception):
    """A status that is no success."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(f"{what}: {status}")
        self.status = status


class Cut(OSError):
    """The connection ended or said nothing sensible."""


@dataclass(frozen=True, slots=True)
class Host:
    """Where to ask. *ns*: the registry that is meant, None at the registry itself."""

    address: str
    port: int
    ns: str | None = None


class Answer:
    """A head that has come, and a body that must be read to its end before the next request."""

    def __init__(self, status: int, fields: dict[bytes, bytes], start: bytes) -> None:
        self.status = status
        self.fields = fields
        self.start = start
        length = fields.get(b"content-length")
        if length is None:
            raise Cut("an answer without a length")
        self.left = int(length)


class Connection:
    """One keep-alive connection to one host, made when it is needed."""

    def __init__(self, host: Host, agent: str) -> None:
        self.host = host
        self._agent = agent
        self._socket: socket.socket | None = None
        self._buffer = memoryview(bytearray(BUFFER))

    def ask(self, method: str, path: str, *fields: str, patience_s: float = PATIENCE_S) -> Answer:
        """Send a request and read the head of the answer. Raises `OSError`."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host.address}:{self.host.port}"]
        request = "\r\n".join([*lines, f"User-Agent: {self._agent}", *fields, "", ""]).encode()
        is_reused = self._socket is not None
        try:
            return self._send(request, method, patience_s)
        except (ConnectionError, Cut):
            self.close()
            if not is_reused:
                raise
        # The server had ended an idle connection: Go's client asks again on a new one.
        return self._send(request, method, patience_s)

    def _send(self, request: bytes, method: str, patience_s: float) -> Answer:
        if self._socket is None:
            where = (self.host.address, self.host.port)
            self._socket = socket.create_connection(where, timeout=DIAL_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(patience_s)
        self._socket.sendall(request)
        head = bytearray()
        while (end := head.find(b"\r\n\r\n")) < 0:
            count = self._socket.recv_into(self._buffer)
            if not count or len(head) > MAX_HEAD:
                raise Cut("the server hung up")
            head += self._buffer[:count]
        first, _, rest = bytes(head[:end]).partition(b"\r\n")
        fields = {}
        for line in rest.split(b"\r\n"):
            name, _, value = line.partition(b":")
            fields[name.lower()] = value.strip()
        answer = Answer(int(first[9:12]), fields, bytes(head[end + 4 :]))
        if method == "HEAD":
            answer.left = 0
        return answer

    def blocks(self, answer: Answer) -> Iterator[memoryview | bytes]:
        """Yield the body as it comes; each block is good until the next. Raises `Cut`."""
        assert self._socket is not None
        if answer.start and answer.left:
            answer.left -= len(answer.start)
            yield answer.start
        while answer.left > 0:
            count = self._socket.recv_into(self._buffer, min(BUFFER, answer.left))
            if not count:
                raise Cut(f"the server cut the body, {answer.left} bytes before its end")
            answer.left -= count
            yield self._buffer[:count]

    def body(self, answer: Answer) -> bytearray:
        """The whole body."""
        assert self._socket is not None
        got = bytearray(answer.left)
        at = len(answer.start) if answer.left else 0
        got[:at] = answer.start[: len(got)]
        view = memoryview(got)
        while at < len(got):
            count = self._socket.recv_into(view[at:])
            if not count:
                raise Cut(f"the server cut the body, {len(got) - at} bytes before its end")
            at += count
        answer.left = 0
        return got

    def close(self) -> None:
        """End it; the next request makes a new one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def split_parts(body: bytearray) -> list[tuple[Span, bytearray]]:
    """The parts of a ``multipart/byteranges`` body, each as long as its Content-Range says."""
    parts: list[tuple[Span, bytearray]] = []
    at = 0
    while (end := body.find(b"\r\n\r\n", at)) >= 0:
        found = content_ranges(bytes(body[at:end]))
        if not found:
            break
        start, stop = found[0]
        at = end + 4 + stop - start
        parts.append(((start, stop), body[end + 4 : at]))
    return parts


def content_ranges(text: bytes) -> list[Span]:
    """The half-open range that a Content-Range field names, or none."""
    match = _CONTENT_RANGE.search(text)
    return [(int(match[1]), int(match[2]) + 1)] if match else []
