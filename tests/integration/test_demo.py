import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import aiohttp
import pytest

from p2pcache.core.model import Digest
from p2pcache.demo.image import (
    LAYER_BUDGET,
    REPOSITORY,
    Image,
    Root,
    build_image,
    choose,
    find_files,
)
from p2pcache.demo.nodes import NodeFailed, run_nodes
from p2pcache.demo.registry import Contents, Registry
from p2pcache.demo.replay import Outcome, Replay, ReplayError, open_session

BOUND_S = 90


@pytest.fixture(scope="module")
def image() -> Image:
    return build_image()


async def start(image: Image, registry: Registry, namespace: str | None = None) -> Outcome:
    async with open_session() as session:
        return await Replay(session, registry.url, namespace, image.start_up).run()


def with_blobs(contents: Contents, change: Callable[[bytes], bytes]) -> Contents:
    return replace(contents, blobs={d: change(data) for d, data in contents.blobs.items()})


def test_the_same_machine_gives_the_same_image(image):
    again = build_image()
    assert again.contents.tags == image.contents.tags
    assert again.start_up == image.start_up


def test_the_image_is_large_enough_to_be_worth_pulling_lazily(image):
    assert image.file_bytes <= image.layers * LAYER_BUDGET
    assert image.files > 500
    assert len(image.start_up.files) > 50


async def test_a_start_reads_a_part_of_the_image_and_finds_every_file_unchanged(image):
    async with Registry({REPOSITORY: image.contents}) as registry:
        outcome = await start(image, registry)
    assert outcome.mismatches == []
    assert outcome.files == len(image.start_up.files)
    assert outcome.requested_bytes == registry.total
    assert outcome.requests == registry.requests
    assert registry.total < image.size * 2 / 3


async def test_a_start_asks_as_containerd_and_the_snapshotter_do(image):
    async with Registry({REPOSITORY: image.contents}) as registry:
        await start(image, registry, "demo.registry")
    first = [(record.method, record.path.split("/")[-2]) for record in registry.records][:3]
    assert first == [("HEAD", "manifests"), ("GET", "manifests"), ("GET", "blobs")]
    blobs = [record for record in registry.records if record.range]
    assert [record.range for record in blobs][: image.layers] == ["bytes=0-1"] * image.layers
    for record in blobs[image.layers :]:
        size = len(image.contents.blobs[Digest.parse(record.path.split("/")[-1])])
        for part in record.range.removeprefix("bytes=").split(","):
            begin, last = map(int, part.split("-"))
            assert begin % 50_000 == 0
            assert (last + 1) % 50_000 == 0 or last + 1 == size


async def test_a_file_that_is_not_the_original_is_a_mismatch(image):
    name = image.start_up.files[0][0]
    wrong = replace(image.start_up, files=((name, "0" * 64), *image.start_up.files[1:]))
    async with Registry({REPOSITORY: image.contents}) as registry:
        outcome = await start(replace(image, start_up=wrong), registry)
    assert outcome.mismatches == [name]


async def test_members_that_do_not_inflate_are_mismatches(image):
    def spoil(data: bytes) -> bytes:
        return data if len(data) < 10_000 else data[:1000] + bytes(99_000) + data[100_000:]

    spoilt = with_blobs(image.contents, spoil)
    async with Registry({REPOSITORY: spoilt}) as registry:
        outcome = await start(image, registry)
    assert outcome.mismatches


async def test_a_layer_that_the_mirror_lacks_fails_the_start(image):
    layers = {d: data for d, data in image.contents.blobs.items() if len(data) < 10_000}
    async with Registry({REPOSITORY: replace(image.contents, blobs=layers)}) as registry:
        with pytest.raises(ReplayError, match="404"):
            await start(image, registry)


async def test_a_mirror_that_is_not_there_fails_the_start(image):
    async with Registry({}) as registry:
        pass
    with pytest.raises(ReplayError):
        await start(image, registry)


async def test_the_registry_counts_bodies_by_phase_but_not_refusals_or_heads(image):
    digest = next(iter(image.contents.blobs))
    async with (
        Registry({REPOSITORY: image.contents}) as registry,
        aiohttp.ClientSession(registry.url) as session,
    ):
        for phase, method, path, headers in (
            ("one", "GET", f"/v2/{REPOSITORY}/blobs/{digest}", {"Range": "bytes=5-14"}),
            ("two", "HEAD", f"/v2/{REPOSITORY}/blobs/{digest}", {}),
            ("two", "GET", f"/v2/{REPOSITORY}/manifests/none", {}),
            ("two", "GET", "/v2/", {}),
        ):
            registry.phase = phase
            async with session.request(method, path, headers=headers) as response:
                await response.read()
    sent = {phase: (t.requests, t.body_bytes) for phase, t in registry.tallies.items()}
    assert sent == {"one": (1, 10), "two": (3, 0)}


async def test_the_head_of_a_blob_tells_its_size(image):
    digest, data = next(iter(image.contents.blobs.items()))
    async with (
        Registry({REPOSITORY: image.contents}) as registry,
        aiohttp.ClientSession(registry.url) as session,
        session.head(f"/v2/{REPOSITORY}/blobs/{digest}") as response,
    ):
        assert response.status == 200
        assert response.content_length == len(data)


def test_files_are_taken_in_order_without_caches_and_links(tmp_path):
    for name in ("b.py", "a/z.py", "a/__pycache__/z.pyc", "config-3/x.a", "site-packages/p.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "link.py").symlink_to("b.py")
    assert [s.name for s in find_files(Root(tmp_path, "lib"))] == ["lib/b.py", "lib/a/z.py"]


def test_what_the_start_up_reads_comes_first_and_tests_last(tmp_path):
    for name in ("a.py", "test/b.py", "c.py", "d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(10))
    found = list(find_files(Root(tmp_path, "lib")))
    first = [source for source in found if source.name == "lib/d.py"]
    assert [s.name for s in choose(first, found, 10)] == ["lib/d.py"]
    assert [s.name for s in choose(first, found, 30)] == ["lib/a.py", "lib/c.py", "lib/d.py"]


def test_a_root_does_not_claim_packages_below_it(tmp_path):
    root = Root(tmp_path, "lib")
    assert root.name_of(tmp_path / "json" / "decoder.py") == "lib/json/decoder.py"
    assert root.name_of(tmp_path / "site-packages" / "aiohttp.py") is None
    assert root.name_of(tmp_path.parent / "elsewhere.py") is None


def run_demo(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run the demo in a session of its own, so that nothing of it is left when it hangs."""
    with subprocess.Popen(
        [sys.executable, "-m", "p2pcache", "demo", *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=BOUND_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_three_nodes_read_little_more_from_the_registry_than_one():
    done = run_demo("--nodes", "3", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) == {
        "nodes",
        "imageBytes",
        "requestedBytes",
        "upstreamBytes",
        "upstreamBytesOneNode",
        "upstreamBytesWithoutMirror",
        "peerBytes",
        "mismatches",
        "seconds",
        "perNode",
    }
    assert document["nodes"] == len(document["perNode"]) == 3
    assert document["mismatches"] == 0
    # The goal of two nodes and more is 1.02 times one node's bytes.
    assert document["upstreamBytes"] <= document["upstreamBytesOneNode"] * 1.02
    # Files that are drawn at random cost more than the goal of 1.2: a block each, in two pieces.
    assert document["upstreamBytesOneNode"] <= document["requestedBytes"] / 3 * 1.5
    assert document["upstreamBytesWithoutMirror"] == document["requestedBytes"]
    assert document["peerBytes"] > 0


def test_one_node_prints_a_table():
    done = run_demo("--nodes", "1", "--registry-delay", "0")
    assert done.returncode == 0, done.stderr
    assert "node-1" in done.stdout
    assert "no difference" in done.stdout
    assert "making an eStargz image" in done.stderr


async def test_a_node_that_cannot_start_shows_what_it_wrote(tmp_path):
    # A file stands where the node's store should be.
    (tmp_path / "node-1").write_text("")
    with pytest.raises(NodeFailed) as caught:
        async with run_nodes(1, tmp_path, "demo.registry", "http://127.0.0.1:1"):
            pass
    assert caught.value.node == "node-1"
    assert caught.value.tail


async def test_no_node_outlives_its_block(tmp_path):
    async with run_nodes(2, tmp_path, "demo.registry", "http://127.0.0.1:1") as nodes:
        assert [node.process.returncode for node in nodes] == [None, None]
        assert len({node.mirror for node in nodes}) == 2
    assert all(node.process.returncode is not None for node in nodes)


async def test_a_node_that_died_is_reported_with_its_exit_code(tmp_path):
    async with run_nodes(1, tmp_path, "demo.registry", "http://127.0.0.1:1") as nodes:
        nodes[0].process.kill()
        await nodes[0].process.wait()
        async with aiohttp.ClientSession() as session:
            with pytest.raises(NodeFailed, match="exit code -9"):
                await nodes[0].read_counters(session)
