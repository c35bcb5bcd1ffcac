"""The benchmark of idle nodes measures right: with few nodes, small images and a short time."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.idle import MAX_NODES, Cost, Rig, main, measure, table
from benchmarks.idle_images import LAYERS, TAG, make_images
from benchmarks.idle_usage import connected, memory, usage
from benchmarks.storm_rig import PREFIX
from p2pcache.core.model import Digest, Tag
from p2pcache.demo.registry import Registry
from p2pcache.demo.replay import Replay, open_session
from tests.e2e.machines import CommandFailed

ENTRIES = 60


def left_behind() -> list[Path]:
    return list(Path("/dev/shm").glob(f"{PREFIX}{os.getpid()}-idle-*"))


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_two_nodes_and_one_that_is_alone_are_measured_and_leave_nothing_behind():
    before = children()
    found = measure(nodes=2, images=1, entries=ENTRIES, seconds=0.5)
    rows = found["rows"]
    assert list(rows) == ["interpreter", "alone", "memberMedian", "memberMax", "withImages"]
    assert rows["alone"]["rssPerAlone"] == 1.0
    assert rows["alone"]["rss"] > rows["interpreter"]["rss"] > 10 << 20
    assert rows["interpreter"]["cpu_share"] < 0.001
    assert all(row["peak_rss"] >= row["rss"] >= row["private"] > 0 for row in rows.values())
    assert found["bounds"]["rss"]["most"] == max(
        rows[name]["rss"] for name in ("memberMax", "withImages")
    )
    assert (found["entries"], found["images"]) == (ENTRIES, 1)
    shown = table(found)
    assert len(shown.splitlines()) == 2 + len(rows) + 2
    assert "the other 1: median" in shown
    assert left_behind() == []
    assert children() == before


def test_one_node_has_no_others():
    found = measure(nodes=1, images=0, entries=ENTRIES, seconds=0.1)
    assert list(found["rows"]) == ["interpreter", "alone", "withImages"]
    assert "node with 0 images" in table(found)


def test_a_node_that_ends_is_an_error_and_nothing_is_left_behind():
    before = children()
    with Rig(1) as rig:
        rig.start({})
        rig._processes[-1].kill()
        with pytest.raises(CommandFailed, match="a process has ended"):
            rig.wait_until_greeted()
    assert left_behind() == []
    assert children() == before


def test_the_same_images_are_made_again_and_none_shares_a_layer():
    images = make_images(2, ENTRIES)
    assert [image.start_up for image in make_images(2, ENTRIES)] == [i.start_up for i in images]
    blobs = [digest for image in images for digest in image.contents.blobs]
    assert len(blobs) == len(set(blobs)) == 2 * (LAYERS + 1)
    assert all(image.entries == ENTRIES for image in images)


async def test_an_image_is_one_that_can_be_started():
    (image,) = make_images(1, ENTRIES)
    repository = image.start_up.repository
    async with (
        Registry({repository: image.contents}) as registry,
        open_session() as session,
        asyncio.timeout(20),
    ):
        outcome = await Replay(session, registry.url, None, image.start_up).run()
    assert outcome.mismatches == []
    assert outcome.files == len(image.start_up.files) > LAYERS
    manifest = image.contents.tags[Tag(TAG)]
    assert manifest == Digest.of(image.contents.manifests[manifest][1])


def test_the_processor_time_of_a_process_is_told_to_the_nanosecond():
    before, own = usage(os.getpid()), time.process_time()
    while time.process_time() - own < 0.02:
        pass
    used = usage(os.getpid()).cpu_s - before.cpu_s
    assert 0.02 <= used < time.process_time() - own + 0.01
    assert usage(os.getpid()).wakeups >= before.wakeups


def test_the_memory_of_another_process_is_told():
    with subprocess.Popen(
        [sys.executable, "-c", "kept = bytes(64 << 20) and bytearray(64 << 20); print(); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        held = memory(process.pid)
        process.stdin.close()
    assert 64 << 20 < held.rss <= held.peak
    assert 64 << 20 < held.private <= held.rss


def test_only_connections_that_a_process_has_made_to_the_port_are_its_own():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert connected([os.getpid()], port) == {os.getpid(): set()}
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            assert connected([os.getpid()], port) == {os.getpid(): {"127.0.0.1"}}
            assert connected([os.getpid()], port + 1) == {os.getpid(): set()}


def test_costs_are_summed_up_figure_by_figure():
    costs = [Cost(*(float(n),) * 9) for n in (1, 5, 3)]
    assert Cost.of(costs, max) == costs[1]


@pytest.mark.parametrize("count", ["0", str(MAX_NODES + 1), "many"])
def test_too_many_nodes_or_none_are_refused(count: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--nodes", count])
    assert "--nodes" in capsys.readouterr().err
