"""How fast are reads of what a node holds, or its peer holds, against nginx with the same bytes?

    python -m benchmarks.held_range [--rounds 5] [--json PATH] [held] [large] [peer]

*held*: 50 kB ranges at random offsets of a whole 300 MB blob, read by wrk (Debian package) over one
connection and over sixteen. *large*: that blob in one read. Both with the server alone on one core
and the client on the other, p2pcache and nginx taking turns; figures are medians over the rounds.
The client's share of its core shows that it was not the limit.

*peer*: 50 kB ranges that the node lacks and its only peer holds, one after the other, against the
same ranges read straight from nginx on the peer: on loopback, and with 0.5 ms between the two
machines. That delay is a relay of blocking threads: the kernel's network emulation is not
everywhere. It is in both arms, its own cost included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

from benchmarks.servers import (
    CLIENT_CORE,
    HOST,
    NAME,
    REGISTRY,
    RangeClient,
    Server,
    blob_path,
    children_cpu_s,
    nginx,
    p2pcache_node,
    pin,
    warm_up,
)
from p2pcache.core.estargz_writer import BuiltLayer, Entry, build_layer
from p2pcache.core.layout import Layout
from p2pcache.core.model import Digest, Tag
from p2pcache.core.proof import find_flaw
from p2pcache.core.ranges import ByteRange
from p2pcache.core.toc import Toc, find_footer, open_tail
from p2pcache.demo.registry import Contents, Registry

RANGE_BYTES: Final = 50_000
BLOB_BYTES: Final = 300_000_000
LAYER_SOURCE_BYTES: Final = 150 << 20
LARGEST_FILE: Final = 1 << 20
CONNECTIONS: Final = (1, 16)
WRK_SECONDS: Final = 3
PEER_DELAY_S: Final = 0.0005
_AGAIN: Final = "the same again, held"
_PIECE: Final = "its pieces, from the peer API"
_PROOF: Final = "proof of its pieces"
_SCRIPT: Final = Path(__file__).with_name("ranges.lua")

Row = dict[str, Any]


@dataclass(slots=True)
class Figures:
    """The figures of one server in one situation, a value per round."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        """Add one round's."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def medians(self) -> dict[str, float]:
        """One value for each."""
        return {name: median(values) for name, values in self.values.items()}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["held", "large", "peer"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reads", type=int, default=100, help="peer reads per round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pin(os.getpid(), CLIENT_CORE)
    results: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="p2pcache-bench-") as folder:
        if "held" in args.parts or "large" in args.parts:
            results += measure_held(Path(folder), args.parts, args.rounds)
        if "peer" in args.parts:
            for delay_s in (0.0, PEER_DELAY_S):
                results += measure_peer(Path(folder), args.rounds, args.reads, delay_s)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


# -- what the node holds -------------------------------------------------------------------------


def measure_held(folder: Path, parts: list[str], rounds: int) -> list[Row]:
    """Held ranges and one large read, p2pcache and nginx in turns."""
    chooser = random.Random(1)
    data = b"".join(chooser.randbytes(1_000_000) for _ in range(BLOB_BYTES // 1_000_000))
    digest = Digest.of(data)
    file = folder / "blob"
    file.write_bytes(data)
    results: list[Row] = []
    with ExitStack() as stack:
        contents = Contents(manifests={}, tags={}, blobs={digest: data})
        with registry(contents) as upstream:
            node = stack.enter_context(p2pcache_node("node", folder, upstream.url))
            warm_up(node, digest, BLOB_BYTES)
        other = stack.enter_context(nginx(folder, {blob_path(digest): file}))
        if "held" in parts:
            for connections in CONNECTIONS:
                results += _alternate(
                    f"held 50 kB, {connections} conn",
                    (node, other),
                    rounds,
                    lambda server, n, c=connections: _wrk(server, digest, c, n),  # type: ignore[misc]
                    rate="per_s",
                )
        if "large" in parts:
            results += _alternate(
                "one 300 MB read",
                (node, other),
                rounds,
                lambda server, n: _large(server, digest),
                rate="mb_per_s",
            )
    return results


def _alternate(
    title: str,
    servers: tuple[Server, Server],
    rounds: int,
    run: Callable[[Server, int], dict[str, float]],
    *,
    rate: str,
) -> list[Row]:
    figures = {server.name: Figures() for server in servers}
    for number in range(rounds):
        # Who is first changes from round to round: what drifts hits both alike.
        for server in servers if number % 2 else servers[::-1]:
            figures[server.name].add(**run(server, number))
    ours, theirs = (figures[server.name].medians() for server in servers)
    ratio = ours[rate] / theirs[rate]
    print(f"\n{title}: p2pcache is {ratio:.2f} of nginx")
    _table({"p2pcache": ours, "nginx": theirs})
    return [{"what": title, "p2pcache": ours, "nginx": theirs, "ratio": ratio}]


def _wrk(server: Server, digest: Digest, connections: int, seed: int) -> dict[str, float]:
    program = shutil.which("wrk")
    if program is None:
        raise SystemExit("this benchmark needs wrk: apt-get install wrk")
    url = f"http://{HOST}:{server.port}"
    size = str(BLOB_BYTES)
    command = [program, "-t1", f"-c{connections}", f"-d{WRK_SECONDS}s", "-s", str(_SCRIPT), url]
    cpu, own = server.cpu_s(), children_cpu_s()
    done = subprocess.run(
        [*command, "--", blob_path(digest), size, str(RANGE_BYTES), str(seed)],
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout.splitlines()[-1])
    assert not said["failed"], said
    assert said["bytes"] >= said["requests"] * RANGE_BYTES, said
    used = server.cpu_s() - cpu
    return {
        "per_s": said["requests"] / said["seconds"],
        "p50_us": said["p50_us"],
        "p99_us": said["p99_us"],
        "server_cpu_us_per_request": used / said["requests"] * 1e6,
        "server_cpu_share": used / said["seconds"],
        "client_cpu_share": (children_cpu_s() - own) / said["seconds"],
    }


def _large(server: Server, digest: Digest) -> dict[str, float]:
    client = RangeClient(server.port)
    try:
        repeats = 3
        cpu, own, began = server.cpu_s(), time.process_time(), time.perf_counter()
        for _ in range(repeats):
            assert client.get_whole(f"{blob_path(digest)}?ns={REGISTRY}") == BLOB_BYTES
        took = time.perf_counter() - began
    finally:
        client.close()
    return {
        "mb_per_s": repeats * BLOB_BYTES / took / 1e6,
        "server_cpu_s_per_gb": (server.cpu_s() - cpu) / (repeats * BLOB_BYTES) * 1e9,
        "server_cpu_share": (server.cpu_s() - cpu) / took,
        "client_cpu_share": (time.process_time() - own) / took,
    }


# -- what a peer holds ---------------------------------------------------------------------------


def measure_peer(folder: Path, rounds: int, reads: int, delay_s: float) -> list[Row]:
    """Ranges that come from a peer, against the same ranges from nginx beside that peer."""
    layer = sample_layer()
    home = folder / f"peer-{delay_s * 1e6:.0f}"
    home.mkdir()
    file = home / "layer"
    file.write_bytes(layer.blob)
    size = len(layer.blob)
    tail = find_footer(layer.blob[-64:], size).tail
    toc = open_tail(layer.blob[tail.start :], size=size, expected=layer.toc_digest)
    layout = toc.layout()
    path = blob_path(layer.digest)
    wanted = _choose_ranges(layout, rounds * reads)
    with ExitStack() as stack:
        upstream = stack.enter_context(registry(_image_of(layer)))
        first = stack.enter_context(p2pcache_node("first", home, upstream.url))
        pull_manifest(first)
        warm_up(first, layer.digest, size)
        other = stack.enter_context(nginx(home, {path: file}))
        far_peer, far_nginx = (
            stack.enter_context(relay(port, delay_s)) if delay_s else port
            for port in (first.peer_port, other.port)
        )
        second = stack.enter_context(
            p2pcache_node(
                "second", home, upstream.url, peers=[f"http://{HOST}:{far_peer}"], core=CLIENT_CORE
            )
        )
        pull_manifest(second)
        before = upstream.total
        cold, direct = RangeClient(second.port), RangeClient(far_nginx)
        local, peer_api = RangeClient(first.port), RangeClient(far_peer)
        for client in (cold, direct, local, peer_api):
            stack.callback(client.close)
        # Opening a blob reads its table of contents: once, and not what is asked here.
        cold.get_range(path, size - 100, size)
        samples: dict[str, list[float]] = {}

        def note(name: str, call: Callable[..., None], *given: object) -> None:
            began = time.perf_counter()
            call(*given)
            samples.setdefault(name, []).append((time.perf_counter() - began) * 1e6)

        cpu = first.cpu_s(), second.cpu_s()
        for number, wanted_part in enumerate(wanted):
            part = (path, wanted_part.start, wanted_part.stop)
            whole = layout.span(layout.covering(wanted_part))
            # Who is first takes turns: the second finds warmer memory.
            if number % 2:
                note("nginx", direct.get_range, *part)
            note("peer", cold.get_range, *part)
            if not number % 2:
                note("nginx", direct.get_range, *part)
            note(_AGAIN, cold.get_range, *part)
            target = f"/p2p/v1/blobs/{layer.digest}"
            note(_PIECE, peer_api.get_range, target, whole.start, whole.stop)
            note(_PROOF, _prove, toc, whole, layer.blob[whole.start : whole.stop])
        cpu_ms = [
            (after - b) / len(wanted) * 1e3
            for after, b in zip((first.cpu_s(), second.cpu_s()), cpu, strict=True)
        ]
        assert upstream.total == before, "the upstream was asked for what the peer holds"
    medians = {name: median(values) for name, values in samples.items()}
    ratio = medians["peer"] / medians["nginx"]
    title = f"50 kB from a peer, {'loopback' if not delay_s else f'{delay_s * 1e3:g} ms away'}"
    print(f"\n{title}: p2pcache takes {ratio:.2f} of nginx (p50), {len(wanted)} reads")
    rest = medians["peer"] - sum(
        medians[name]
        for name in (
            _AGAIN, _PIECE, _PROOF
        )
    )  # fmt: skip
    rows = {
        name: {"p50_us": medians[name], "p99_us": quantiles(values, n=100)[98]}
        for name, values in samples.items()
    }
    rows["all else (threads, tasks, client)"] = {"p50_us": rest, "p99_us": float("nan")}
    _table(rows)
    print(f"processor time per read: peer {cpu_ms[0]:.2f} ms, node {cpu_ms[1]:.2f} ms")
    return [
        {
            "what": title,
            "p2pcache": {"p50_us": medians["peer"]},
            "nginx": {"p50_us": medians["nginx"]},
            "ratio": ratio,
            "breakdown_p50_us": medians | {"all else": rest},
            "reads": len(wanted),
        }
    ]


def _prove(toc: Toc, part: ByteRange, data: bytes) -> None:
    assert find_flaw(toc, part, data) is None


def _choose_ranges(layout: Layout, count: int) -> list[ByteRange]:
    """Ranges at any offset, as snapshotters ask for them, of which no two share a piece."""
    chooser = random.Random(2)
    taken: set[int] = {layout.count - 1}  # the table of contents: read at the start
    found: list[ByteRange] = []
    for _ in range(50 * count):
        start = chooser.randrange(layout.starts[-1] - RANGE_BYTES)
        part = ByteRange(start, start + RANGE_BYTES)
        pieces = set(layout.covering(part))
        if taken.isdisjoint(pieces):
            taken |= pieces
            found.append(part)
        if len(found) == count:
            break
    return found


def sample_layer() -> BuiltLayer:
    """A layer of this Python's own files: real data, as compressible as software is."""
    paths = sysconfig.get_paths()
    homes = dict.fromkeys((paths["stdlib"], paths["purelib"]))
    entries: dict[str, Entry] = {}
    left = LAYER_SOURCE_BYTES
    for path in sorted(path for home in homes for path in Path(home).rglob("*")):
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_FILE:
            continue
        data = path.read_bytes()
        name = str(path).lstrip("/").replace("/", "_")
        if len(data) <= left and name not in entries:
            left -= len(data)
            entries[name] = Entry(name, data)
    return build_layer(entries.values(), level=5)


def _image_of(layer: BuiltLayer) -> Contents:
    config = b"{}"
    media = "application/vnd.oci.image"
    body = {
        "schemaVersion": 2,
        "mediaType": f"{media}.manifest.v1+json",
        "config": {
            "mediaType": f"{media}.config.v1+json",
            "digest": str(Digest.of(config)),
            "size": len(config),
        },
        "layers": [
            {
                "mediaType": f"{media}.layer.v1.tar+gzip",
                "digest": str(layer.digest),
                "size": len(layer.blob),
                "annotations": layer.annotations,
            }
        ],
    }
    manifest = json.dumps(body).encode()
    digest = Digest.of(manifest)
    return Contents(
        manifests={digest: (f"{media}.manifest.v1+json", manifest)},
        tags={Tag("latest"): digest},
        blobs={layer.digest: layer.blob, Digest.of(config): config},
    )


def pull_manifest(node: Server) -> None:
    """Read the image's manifest through *node*, which learns of the table of contents by it."""
    client = RangeClient(node.port)
    try:
        client.get_whole(f"/v2/{NAME}/manifests/latest?ns={REGISTRY}")
    finally:
        client.close()


# -- around it -----------------------------------------------------------------------------------


@contextmanager
def registry(contents: Contents) -> Iterator[Registry]:
    """Serve *contents* from a thread of this process."""
    served = Registry({NAME: contents})
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with served:
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        if not ready.wait(10):
            raise SystemExit("the benchmark's registry did not start")
        yield served
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@contextmanager
def relay(port: int, delay_s: float) -> Iterator[int]:
    """Run a relay to *port* that holds every request back for *delay_s*; yield its own port."""
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from benchmarks.held_range import relay_forever as r; r({port}, {delay_s})",
        ],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def relay_forever(port: int, delay_s: float) -> None:
    """Be the relay. Requests are small and one after the other: only they are held back."""
    listening = socket.create_server((HOST, 0))
    print(listening.getsockname()[1], flush=True)

    def copy(source: socket.socket, target: socket.socket, wait_s: float) -> None:
        buffer = memoryview(bytearray(256 << 10))
        while count := source.recv_into(buffer):
            if wait_s:
                time.sleep(wait_s)
            target.sendall(buffer[:count])
        target.shutdown(socket.SHUT_WR)

    while True:
        near, _ = listening.accept()
        far = socket.create_connection((HOST, port))
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, target, wait_s in ((near, far, delay_s), (far, near, 0.0)):
            threading.Thread(target=copy, args=(source, target, wait_s), daemon=True).start()


def _table(rows: dict[str, dict[str, float]]) -> None:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = max(len(name) for name in rows) + 2
    print(" " * width + "".join(f"{name:>{max(12, len(name) + 2)}}" for name in columns))
    for name, row in rows.items():
        cells = (
            f"{row.get(column, float('nan')):>{max(12, len(column) + 2)},.{_digits(column)}f}"
            for column in columns
        )
        print(f"{name:<{width}}" + "".join(cells))


def _digits(column: str) -> int:
    return 0 if column in {"per_s", "mb_per_s", "p50_us", "p99_us"} else 2


if __name__ == "__main__":
    main()
