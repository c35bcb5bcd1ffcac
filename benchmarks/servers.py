"""What the benchmarks measure, as processes pinned to a core: p2pcache nodes, and nginx.

Hides flags, ports, configuration files and readiness. The rule: nothing outlives the block that it
was started in, and whatever is compared serves the same bytes in the same run.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Final

from p2pcache.core.model import Digest
from p2pcache.core.wire import Holding, decode_holding
from p2pcache.demo.nodes import free_ports

HOST: Final = "127.0.0.1"
REGISTRY: Final = "registry.test"
NAME: Final = "bench"
SERVER_CORE: Final = 0
CLIENT_CORE: Final = 1

_READY_S: Final = 20.0
_WHOLE_S: Final = 60.0
_POLL_S: Final = 0.02
_STORE_SIZE: Final = "4GiB"
_BUFFER: Final = 256 << 10

_NGINX_CONF: Final = """
worker_processes 1;
worker_cpu_affinity {mask};
pid {folder}/nginx.pid;
error_log {folder}/error.log;
daemon off;
user root;
events {{ worker_connections 512; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    tcp_nodelay on;
    keepalive_requests 100000000;
    keepalive_timeout 600;
    open_file_cache max=100;
    client_body_temp_path {folder}/tmp;
    proxy_temp_path {folder}/tmp;
    fastcgi_temp_path {folder}/tmp;
    uwsgi_temp_path {folder}/tmp;
    scgi_temp_path {folder}/tmp;
    default_type application/octet-stream;
    server {{
        listen {host}:{port} backlog=1024;
        root {folder}/root;
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. *port* is where clients read blobs."""

    name: str
    port: int
    pids: tuple[int, ...]
    peer_port: int = 0
    status_port: int = 0

    def cpu_s(self) -> float:
        """The processor time that it has used so far."""
        ticks = 0
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def blob_path(digest: Digest) -> str:
    """The request target of a blob; nginx has a file there."""
    return f"/v2/{NAME}/blobs/{digest}"


@contextmanager
def p2pcache_node(
    name: str,
    folder: Path,
    upstream: str,
    *,
    peers: Sequence[str] = (),
    core: int | None = SERVER_CORE,
) -> Iterator[Server]:
    """Run ``p2pcache serve`` with an empty store in *folder*; yield once it is ready."""
    mirror, peer, status = free_ports(3)
    flags = [
        "--node-name", name,
        "--store", str(folder / name),
        "--store-size", _STORE_SIZE,
        "--mirror-listen", f"{HOST}:{mirror}",
        "--peer-listen", f"{HOST}:{peer}",
        "--status-listen", f"{HOST}:{status}",
        "--upstream", f"{REGISTRY}={upstream}",
    ]  # fmt: skip
    for url in peers:
        flags += ["--peer", url]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "p2pcache", "serve", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    with _ended(process):
        pin(process.pid, core)
        try:
            _wait_for(lambda: _answers(status, "/readyz"), process, name)
        except SystemExit:
            sys.stderr.write((folder / f"{name}.log").read_text(errors="replace")[-2000:])
            raise
        yield Server(name, mirror, (process.pid,), peer, status)


@contextmanager
def nginx(folder: Path, files: dict[str, Path], core: int = SERVER_CORE) -> Iterator[Server]:
    """Run nginx with one worker over *files*, by request path; yield once it answers."""
    program = shutil.which("nginx", path=f"{os.defpath}:/usr/sbin")
    if program is None:
        raise SystemExit("this benchmark needs nginx: apt-get install nginx-light")
    home = folder / "nginx"
    (home / "tmp").mkdir(parents=True)
    (home / "root").mkdir()
    (home / "root" / "ready").write_text("ok")
    for path, file in files.items():
        target = home / "root" / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file)
    [port] = free_ports(1)
    config = home / "nginx.conf"
    config.write_text(_NGINX_CONF.format(folder=home, host=HOST, port=port, mask=f"{1 << core:b}"))
    process = subprocess.Popen(
        [program, "-p", str(home), "-c", str(config)], stderr=subprocess.DEVNULL
    )
    with _ended(process):
        _wait_for(lambda: _answers(port, "/ready"), process, "nginx")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        workers = tuple(map(int, children.split()))
        assert len(workers) == 1, "one worker, as the comparison says"
        yield Server("nginx", port, workers)


def pin(pid: int, core: int | None) -> None:
    """Keep all threads of a process on *core*. On a machine with one core nothing is pinned."""
    if core is None or (os.cpu_count() or 1) < 2:
        return
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def warm_up(node: Server, digest: Digest, size: int) -> None:
    """Have *node* read the whole blob from its upstream, as any client would; wait for its proof.

    Afterwards it holds the blob whole, and has checked every piece.
    """
    client = RangeClient(node.port)
    try:
        got = client.get_whole(f"{blob_path(digest)}?ns={REGISTRY}")
        assert got == size, f"{got} bytes instead of {size}"
        deadline = time.monotonic() + _WHOLE_S
        while not (holding := holding_of(node, digest)) or not holding.is_whole:
            if time.monotonic() > deadline:
                raise SystemExit(f"{node.name} does not hold the blob whole: {holding}")
            time.sleep(_POLL_S)
        # The second reading comes from the store, and so finds every piece in the page cache.
        assert client.get_whole(blob_path(digest) + f"?ns={REGISTRY}") == size
    finally:
        client.close()


def holding_of(node: Server, digest: Digest) -> Holding | None:
    """What *node* tells its peers that it holds."""
    connection = HTTPConnection(HOST, node.peer_port, timeout=5)
    try:
        connection.request("GET", f"/p2p/v1/blobs/{digest}/holding")
        response = connection.getresponse()
        body = response.read()
        return decode_holding(body) if response.status == 200 else None
    finally:
        connection.close()


class RangeClient:
    """One keep-alive connection that reads bodies into the same buffer: as cheap as Python gets."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((HOST, port), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = memoryview(bytearray(_BUFFER))

    def get_range(self, path: str, start: int, stop: int) -> None:
        """Read one range to its end. Fails unless exactly that came."""
        got = self._get(path, f"Range: bytes={start}-{stop - 1}\r\n", b"206")
        assert got == stop - start, f"{got} bytes of {start}-{stop}"

    def get_whole(self, path: str) -> int:
        """Read a body to its end and return its length."""
        return self._get(path, "", b"200")

    def _get(self, path: str, headers: str, status: bytes) -> int:
        request = f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n{headers}\r\n"
        self._socket.sendall(request.encode("ascii"))
        head = bytearray()
        while (end := head.find(b"\r\n\r\n")) < 0:
            count = self._socket.recv_into(self._buffer)
            if not count:
                raise ConnectionError("the server hung up")
            head += self._buffer[:count]
        assert head[9:12] == status, bytes(head[:end])
        length = int(bytes(head[:end]).lower().partition(b"content-length: ")[2].split(b"\r")[0])
        got = len(head) - end - 4
        while got < length:
            count = self._socket.recv_into(self._buffer)
            if not count:
                raise ConnectionError("the server cut the body")
            got += count
        return length

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


def children_cpu_s() -> float:
    """The processor time of all ended child processes so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _wait_for(is_so: Callable[[], bool], process: subprocess.Popen[bytes], name: str) -> None:
    deadline = time.monotonic() + _READY_S
    while not is_so():
        if process.poll() is not None:
            raise SystemExit(f"{name} ended at its start with status {process.returncode}")
        if time.monotonic() > deadline:
            raise SystemExit(f"{name} was not ready after {_READY_S:.0f} s")
        time.sleep(_POLL_S)


def _answers(port: int, path: str) -> bool:
    connection = HTTPConnection(HOST, port, timeout=2)
    with ExitStack() as stack:
        stack.callback(connection.close)
        with suppress(OSError, HTTPException):
            connection.request("GET", path)
            return connection.getresponse().status == 200
    return False
