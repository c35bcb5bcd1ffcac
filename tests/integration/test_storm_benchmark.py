"""The storm's harness measures right: on loopback, with small images and few nodes."""

import argparse
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.storm import measure
from benchmarks.storm_arms import Arm, NoMirror, P2pcache, SharedCache
from benchmarks.storm_client import Client, Image
from benchmarks.storm_http import split_parts
from benchmarks.storm_image import build_plain, read_plan, small_lazy_image
from benchmarks.storm_registry import SEND_BUFFER, Pacer, Registry, parse_ranges
from benchmarks.storm_report import Round, describe, plot, table, verdict
from benchmarks.storm_rig import Storm

LAYER_BYTES = 3_000_000


@pytest.fixture(scope="module")
def lazy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lazy")
    small_lazy_image(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    build_plain(folder, 2, LAYER_BYTES)
    return folder


def run(
    image: Path, arm: Arm, nodes: int, *, mbit: float = 0.0, loopback: bool = True
) -> dict[str, Any]:
    args = argparse.Namespace(
        nodes=nodes, loopback=loopback, upstream_mbit=mbit, upstream_delay_ms=0.0, think_ms=1.0,
        parallel=2, limit=60.0, rounds=1,
    )  # fmt: skip
    found: dict[str, Any] = measure(image, [arm], args)["arms"][arm.name]
    assert "failed" not in found, found
    return found


@contextmanager
def serving(image: Path) -> Iterator[tuple[Registry, int]]:
    """A registry in a thread, which ends with the test run."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    registry = Registry(image, Pacer(0), 0.0)
    threading.Thread(target=registry.serve, args=("127.0.0.1", port), daemon=True).start()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                break
    yield registry, port


def client_of(image: Path, *ports: int) -> Client:
    hosts = [{"address": "127.0.0.1", "port": port} for port in ports]
    task = {"name": "node-1", "netns": None, "hosts": hosts}
    return Client(task, Image(str(image)), 0.0, 2)


@pytest.mark.parametrize("kind", ["lazy", "plain"])
def test_without_a_mirror_n_clients_cost_n_times_what_the_plan_says(
    kind: str, request: pytest.FixtureRequest
):
    image: Path = request.getfixturevalue(kind)
    found = run(image, NoMirror(), 3)
    assert found["upstreamRatio"] == 3.0
    assert (found["mismatches"], found["errors"], found["fallbacks"]) == (0, 0, 0)
    assert len(found["rounds"][0]["seconds"]) == 3
    # Multipart answers are framed: some bytes more than what was asked for.
    asked = read_plan(image).asked_bytes
    assert asked <= found["oneNodeUpstreamBytes"] <= asked * 1.05


@pytest.mark.parametrize("kind", ["lazy", "plain"])
def test_nodes_serve_the_image_and_are_accounted_for(kind: str, request: pytest.FixtureRequest):
    found = run(request.getfixturevalue(kind), P2pcache(), 2)
    assert (found["mismatches"], found["errors"], found["fallbacks"]) == (0, 0, 0)
    assert found["cpuSeconds"] > 0
    assert found["maxRssBytes"] > 10e6
    assert found["counters"]['p2pcache_served_bytes_total{source="upstream"}'] > 0
    assert found["oneNodeUpstreamBytes"] > 0


def test_the_registry_keeps_to_its_rate_on_loopback(plain: Path):
    found = run(plain, NoMirror(), 2, mbit=100)
    least = 2 * 2 * LAYER_BYTES * 8 / 100e6
    assert least * 0.98 < found["lastSeconds"]


@pytest.mark.e2e
def test_hosts_with_networks_of_their_own_share_one_line(plain: Path):
    """And a cache between them is read by every client, whatever it reads itself."""
    direct = run(plain, NoMirror(), 2, mbit=100, loopback=False)
    assert direct["upstreamRatio"] == 2.0
    # Twice, with the headers of every packet.
    assert direct["wireBytes"] > 4 * LAYER_BYTES
    assert direct["lastSeconds"] > 4 * LAYER_BYTES * 8 / 100e6 * 0.9
    through = run(plain, SharedCache(), 2, mbit=100, loopback=False)
    assert (through["mismatches"], through["errors"], through["fallbacks"]) == (0, 0, 0)
    assert through["cpuSeconds"] > 0


@pytest.mark.parametrize("kind", ["lazy", "plain"])
def test_a_wrong_byte_is_a_mismatch(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    image: Path = request.getfixturevalue(kind)
    served = tmp_path / "served"
    shutil.copytree(image, served)
    layer = read_plan(image).layers[0]
    file = served / "blobs" / layer.digest.partition(":")[2]
    data = bytearray(file.read_bytes())
    data[-20] ^= 1  # in the footer, which every client reads
    file.write_bytes(data)
    with serving(served) as (_, port):
        client = client_of(image, port)
        client.run()
    assert client.outcome.mismatches == 1
    assert client.outcome.errors == 0


def test_a_client_goes_past_a_mirror_that_is_not_there(lazy: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = free.getsockname()[1]
    with serving(lazy) as (registry, port):
        client = client_of(lazy, nobody, port)
        client.run()
    assert client.outcome.errors == 0
    assert client.outcome.fallbacks == client.outcome.requests > 0
    assert registry.counters.by_client == {
        "127.0.0.1": registry.counters.blob_bytes + registry.counters.manifest_bytes
    }


def test_a_reader_that_hangs_up_is_charged_for_what_was_sent(plain: Path):
    layer = read_plan(plain).layers[0]
    with serving(plain) as (registry, port):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            path = f"/v2/storm/app/blobs/{layer.digest}"
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
            connection.recv(1000)
        deadline = time.monotonic() + 10
        while registry.counters.in_flight and time.monotonic() < deadline:
            threading.Event().wait(0.01)
    # What the reader's kernel took before it hung up was sent, wanted or not.
    with socket.socket() as probe:
        room = probe.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    assert 0 < registry.counters.blob_bytes <= max(room, 1 << 20) + 2 * SEND_BUFFER


def test_a_plain_pull_goes_on_where_it_was_cut(plain: Path):
    """containerd asks for the rest, at the first host again."""
    plan = read_plan(plain)
    asked: list[str] = []
    with serving(plain) as (_, upstream), socket.create_server(("127.0.0.1", 0)) as listening:

        def cut_once() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection, socket.create_connection(("127.0.0.1", upstream)) as far:
                    head = connection.recv(65536).decode()
                    asked.append(head)
                    far.sendall(head.encode().replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                    whole = sum("/blobs/" in a and plan.layers[0].digest in a for a in asked) == 1
                    left = 100_000 if whole and plan.layers[0].digest in head else 1 << 30
                    far.settimeout(0.5)
                    try:
                        while left > 0 and (block := far.recv(min(65536, left))):
                            connection.sendall(block)
                            left -= len(block)
                    except OSError:
                        pass

        threading.Thread(target=cut_once, daemon=True).start()
        client = client_of(plain, listening.getsockname()[1])
        client.parallel = 1
        client.run()
        listening.shutdown(socket.SHUT_RDWR)
    assert (client.outcome.mismatches, client.outcome.errors) == (0, 0), client.outcome.notes
    assert client.outcome.retries == 1
    ranges = [line for a in asked for line in a.split("\r\n") if line.startswith("Range:")]
    assert len(ranges) == 1
    assert ranges[0].endswith("-")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", None),
        ("bytes=0-1", [(0, 2)]),
        ("bytes=5-", [(5, 10)]),
        ("bytes=-3", [(7, 10)]),
        ("bytes=0-0,4-99", [(0, 1), (4, 10)]),
        ("bytes=10-", []),
        ("bytes=-", None),
        ("lines=1-2", None),
    ],
)
def test_ranges_mean_what_the_rfc_says(header: str, expected: list[tuple[int, int]] | None):
    assert parse_ranges(header, 10) == expected


def test_parts_are_as_long_as_they_say():
    body = bytearray(
        b"\r\n--x\r\nContent-Range: bytes 0-3/90\r\n\r\n--x\n"
        b"\r\n--x\r\ncontent-range: bytes 7-7/90\r\n\r\nz\r\n--x--\r\n"
    )
    assert split_parts(body) == [((0, 4), bytearray(b"--x\n")), ((7, 8), bytearray(b"z"))]


def a_storm(seconds: list[float], upstream: int) -> Storm:
    client = dict.fromkeys(("mismatches", "errors", "fallbacks", "retries"), 0)
    return Storm(
        clients=[client for _ in seconds],
        seconds=seconds,
        upstream_bytes=upstream,
        window_s=seconds[-1],
        cpu_s={"nodes": 1.0, "registry": 0.1, "clients": 0.2, "machine": 1.5},
    )


def test_ratios_are_between_storms_of_one_round(plain: Path, tmp_path: Path):
    rounds = [
        Round(a_storm([2.0], 100), a_storm([2.0, 3.0], 100)),
        Round(a_storm([4.0], 100), a_storm([4.0, 4.4], 104)),
    ]
    found = describe(rounds, read_plan(plain))
    assert (found["upstreamRatio"], found["worstUpstreamRatio"]) == (1.02, 1.04)
    assert (found["timeRatio"], found["worstTimeRatio"]) == (1.3, 1.5)
    assert (found["firstSeconds"], found["lastSeconds"]) == (3.0, 3.7)
    assert found["nodes"] == 2
    assert verdict(found).count("NO") == 2
    arms = {"p2pcache": found, "spegel": {"nodes": 2, "failed": "no such thing\nat all"}}
    assert "failed: no such thing" in table(arms)
    document = {"nodes": 2, "upstreamMbit": 100.0, "image": {"kind": "plain"}, "arms": arms}
    json.dumps(document)
    picture = tmp_path / "storm.png"
    plot(document, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
