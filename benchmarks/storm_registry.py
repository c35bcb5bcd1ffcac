"""A registry that never is the bottleneck and counts every body byte: threads and ``sendfile``.

Hides the pull half of the distribution specification and the counting. The rule: bytes count when
the kernel has taken them, less what it still held when the connection ended, so a reader that hangs
up is charged for what was sent to it. Standard library only: run by path, in a network of its own.

``GET /storm/counters``, asked over any address, tells the counts and is not counted itself.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import select
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

# What the kernel may hold of one connection is all that a count could be wrong by.
SEND_BUFFER = 128 << 10
SLICE = 256 << 10
PACED_SLICE = 16 << 10
MAX_HEAD = 32 << 10
MAX_CONNECTIONS = 2048
IDLE_S = 300.0
BOUNDARY = "storm-part"
# linux/sockios.h: bytes of a socket's send queue that are not acknowledged yet.
SIOCOUTQ = 0x5411
_PATH = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs)/(?P<reference>[^/]+)")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_SPEC = re.compile(r"(\d*)-(\d*)")
_REASONS = {200: "OK", 206: "Partial Content", 404: "Not Found", 405: "Method Not Allowed"}


@dataclass(slots=True)
class Pacer:
    """Lets through so many bytes a second, of all connections together. No rate: everything."""

    bytes_per_s: float
    _free_at: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, size: int) -> None:
        """Return when the last of *size* more bytes may have gone out."""
        if not self.bytes_per_s:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + size / self.bytes_per_s
            left = self._free_at - time.monotonic()
        if left > 0:
            time.sleep(left)


@dataclass(slots=True)
class Counters:
    """What was sent, in all and to each address."""

    requests: int = 0
    manifest_bytes: int = 0
    blob_bytes: int = 0
    in_flight: int = 0
    by_client: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def began(self) -> None:
        """A request has come."""
        with self.lock:
            self.requests += 1
            self.in_flight += 1

    def ended(self) -> None:
        """It has been answered, or its connection has ended."""
        with self.lock:
            self.in_flight -= 1

    def sent(self, client: str, kind: str, size: int) -> None:
        """*size* body bytes went to *client*; negative: they did not after all."""
        with self.lock:
            if kind == "manifests":
                self.manifest_bytes += size
            else:
                self.blob_bytes += size
            self.by_client[client] = self.by_client.get(client, 0) + size

    def document(self) -> bytes:
        """The counts as JSON."""
        with self.lock:
            return json.dumps(
                {
                    "requests": self.requests,
                    "manifestBytes": self.manifest_bytes,
                    "blobBytes": self.blob_bytes,
                    "inFlight": self.in_flight,
                    "byClient": self.by_client,
                }
            ).encode()


class Registry:
    """Serves the image in a folder (see `storm_image`)."""

    def __init__(self, image: Path, pacer: Pacer, delay_s: float) -> None:
        self.counters = Counters()
        self._pacer = pacer
        self._delay_s = delay_s
        self._blobs = {path.name: path for path in (image / "blobs").iterdir()}
        plan = json.loads((image / "plan.json").read_text())
        entry = (plan["manifest"], plan["manifest_type"])
        self._manifests = {
            f"{plan['repository']}:{reference}": entry
            for reference in (plan["tag"], plan["manifest"])
        }

    def serve(self, address: str, port: int) -> None:
        """Serve for ever, each connection in a thread of its own."""
        with socket.create_server((address, port), backlog=1024) as listening:
            slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
            while True:
                connection, peer = listening.accept()
                slots.acquire()
                threading.Thread(
                    target=self._talk, args=(connection, peer[0], slots), daemon=True
                ).start()

    def _talk(
        self, connection: socket.socket, client: str, slots: threading.BoundedSemaphore
    ) -> None:
        try:
            with connection, suppress(OSError):
                connection.settimeout(IDLE_S)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                rest = b""
                while head := self._read_head(connection, rest):
                    text, rest = head
                    self._answer(connection, client, text)
        finally:
            slots.release()

    def _read_head(self, connection: socket.socket, got: bytes) -> tuple[str, bytes] | None:
        while (end := got.find(b"\r\n\r\n")) < 0:
            block = connection.recv(MAX_HEAD)
            if not block or len(got) > MAX_HEAD:
                return None
            got += block
        return got[:end].decode("latin-1"), got[end + 4 :]

    def _answer(self, connection: socket.socket, client: str, head: str) -> None:
        first, _, rest = head.partition("\r\n")
        method, _, target = first.partition(" ")
        path = target.partition(" ")[0].partition("?")[0]
        fields = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in rest.split("\r\n"))
        }
        if path == "/storm/counters":
            return _send(connection, 200, "application/json", self.counters.document())
        if path.rstrip("/") == "/v2":
            return _send(connection, 200, "application/json", b"{}")
        self.counters.began()
        try:
            if self._delay_s:
                time.sleep(self._delay_s)
            self._answer_read(connection, client, method, path, fields.get("range", ""))
        finally:
            self.counters.ended()

    def _answer_read(
        self, connection: socket.socket, client: str, method: str, path: str, wanted: str
    ) -> None:
        if method not in {"GET", "HEAD"}:
            return _refuse(connection, 405, "UNSUPPORTED", head=False)
        is_head = method == "HEAD"
        match = _PATH.fullmatch(path)
        if match is None:
            return _refuse(connection, 404, "UNSUPPORTED", head=is_head)
        kind, reference = match["kind"], match["reference"]
        media_type = "application/octet-stream"
        if kind == "manifests":
            entry = self._manifests.get(f"{match['name']}:{reference}")
            if entry is None:
                return _refuse(connection, 404, "MANIFEST_UNKNOWN", head=is_head)
            reference, media_type = entry
        digest = _DIGEST.fullmatch(reference)
        file = self._blobs.get(digest[1]) if digest else None
        if file is None:
            return _refuse(connection, 404, "BLOB_UNKNOWN", head=is_head)
        size = file.stat().st_size
        parts = parse_ranges(wanted, size) if kind == "blobs" else None
        fields = [f"Docker-Content-Digest: {reference}", "Accept-Ranges: bytes"]
        if parts == []:
            fields.append(f"Content-Range: bytes */{size}")
            return _send(connection, 416, "text/plain", b"", fields, head=is_head)
        fields.append(f'ETag: "{reference}"')
        frames, end = [b""], b""
        if parts is None:
            status, parts = 200, [(0, size)]
        elif len(parts) == 1:
            status = 206
            fields.append(f"Content-Range: bytes {parts[0][0]}-{parts[0][1] - 1}/{size}")
        else:
            status = 206
            frames = [
                f"\r\n--{BOUNDARY}\r\nContent-Type: {media_type}\r\n"
                f"Content-Range: bytes {start}-{stop - 1}/{size}\r\n\r\n".encode()
                for start, stop in parts
            ]
            end = f"\r\n--{BOUNDARY}--\r\n".encode()
            media_type = f"multipart/byteranges; boundary={BOUNDARY}"
        length = sum(stop - start for start, stop in parts) + sum(map(len, frames)) + len(end)
        connection.sendall(_head(status, media_type, length, fields))
        if is_head:
            return None
        try:
            with file.open("rb") as source:
                for frame, (start, stop) in zip(frames, parts, strict=True):
                    self._count_and_send(connection, client, kind, frame)
                    self._send_file(connection, client, kind, source.fileno(), start, stop)
                self._count_and_send(connection, client, kind, end)
        except OSError:
            self.counters.sent(client, kind, -_unsent(connection))
            raise
        return None

    def _count_and_send(
        self, connection: socket.socket, client: str, kind: str, data: bytes
    ) -> None:
        if data:
            self._pacer.wait(len(data))
            connection.sendall(data)
            self.counters.sent(client, kind, len(data))

    def _send_file(
        self, connection: socket.socket, client: str, kind: str, source: int, start: int, stop: int
    ) -> None:
        largest = PACED_SLICE if self._pacer.bytes_per_s else SLICE
        while start < stop:
            size = min(largest, stop - start)
            self._pacer.wait(size)
            until = start + size
            while start < until:
                count = _sendfile(connection, source, start, until - start)
                self.counters.sent(client, kind, count)
                start += count


def _sendfile(connection: socket.socket, source: int, start: int, size: int) -> int:
    # A socket with a timeout is non-blocking below: wait for room as `socket.sendall` would.
    while True:
        try:
            count = os.sendfile(connection.fileno(), source, start, size)
        except BlockingIOError:
            _wait_for_room(connection)
            continue
        if not count:
            raise OSError("the file ended early")
        return count


def _wait_for_room(connection: socket.socket) -> None:
    poller = select.poll()
    poller.register(connection, select.POLLOUT)
    if not poller.poll(IDLE_S * 1000):
        raise TimeoutError("the reader has stopped reading")


def _unsent(connection: socket.socket) -> int:
    with suppress(OSError):
        answer = fcntl.ioctl(connection.fileno(), SIOCOUTQ, bytes(4))
        return int(struct.unpack("i", answer)[0])
    return 0


def parse_ranges(header: str, size: int) -> list[tuple[int, int]] | None:
    """The half-open ranges that a Range header means (RFC 9110, 14.1.2).

    None: there is no usable header, so the whole is meant. Empty: none can be satisfied.
    """
    unit, _, specs = header.partition("=")
    if unit.strip().lower() != "bytes":
        return None
    parts = []
    for spec in specs.split(","):
        match = _SPEC.fullmatch(spec.strip())
        if match is None or match[0] == "-":
            return None
        first, last = match[1], match[2]
        if not first:
            start, stop = max(0, size - int(last)), size
        else:
            start, stop = int(first), min(int(last) + 1, size) if last else size
        if start < stop:
            parts.append((start, stop))
    return parts


def _head(status: int, media_type: str, length: int, fields: list[str]) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}",
        f"Content-Type: {media_type}",
        f"Content-Length: {length}",
        "Docker-Distribution-API-Version: registry/2.0",
        *fields,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _send(
    connection: socket.socket,
    status: int,
    media_type: str,
    body: bytes,
    fields: list[str] | None = None,
    *,
    head: bool = False,
) -> None:
    answer = _head(status, media_type, len(body), fields or [])
    connection.sendall(answer if head else answer + body)


def _refuse(connection: socket.socket, status: int, code: str, *, head: bool) -> None:
    body = json.dumps({"errors": [{"code": code, "message": code.lower()}]}).encode()
    _send(connection, status, "application/json", body, head=head)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--mbit", type=float, default=0.0, help="0: the network sets the pace")
    parser.add_argument("--delay-ms", type=float, default=0.0)
    args = parser.parse_args()
    address, _, port = args.listen.rpartition(":")
    # Hundreds of threads that mostly sit in the kernel: hand over soon when one has come back.
    sys.setswitchinterval(0.001)
    pacer = Pacer(args.mbit * 1e6 / 8)
    Registry(args.image, pacer, args.delay_ms / 1000).serve(address, int(port))


if __name__ == "__main__":
    main()
