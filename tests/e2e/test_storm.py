"""Four nodes start the same image at the same moment: between them they read it once."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.images import GZIP, PLAIN, ZSTD, unforeseen
from tests.e2e.rig import FAR, Node, Rig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(480)]

NODES = 4
TWICE = 0.06
"""The share of what one node needs that may be read a second time: tags are each node's own
question, and nodes that ask at the same moment may miss each other by a hair."""


def at_once(rig: Rig, start) -> None:
    with ThreadPoolExecutor(NODES) as threads:
        for started in [threads.submit(start, node) for node in rig.nodes]:
            started.result(timeout=240)


def needed_bytes(node: Node) -> float:
    """What a node took in, from wherever."""
    fetched = node.mirror.metrics()["p2pcache_fetched_bytes_total"]
    return sum(fetched.values())


def read_bytes(rig: Rig) -> int:
    """What the registry sent, by its own log."""
    return sum(request.written for request in rig.registry.settled())


def check_read_once(rig: Rig) -> None:
    needed = max(map(needed_bytes, rig.nodes))
    assert read_bytes(rig) <= (1 + TWICE) * needed
    for node in rig.nodes:
        assert not node.traffic().past_the_mirror
        assert node.mirror.total("p2pcache_peer_blames_total") == 0


@pytest.mark.parametrize("tag", [GZIP, ZSTD])
def test_lazy_starts_at_the_same_moment_read_the_registry_once(images, tag):
    def start(node: Node) -> None:
        node.pull_lazily(tag)
        assert node.run(tag).startswith("started")
        assert node.run(tag, unforeseen()) == images.unforeseen_output

    with Rig(images, nodes=NODES, line=FAR) as rig:
        rig.start_nodes()
        at_once(rig, start)
        check_read_once(rig)


def test_plain_pulls_at_the_same_moment_read_the_registry_once(images):
    def start(node: Node) -> None:
        node.pull(PLAIN)
        assert node.run_pulled(PLAIN, unforeseen()) == images.unforeseen_output

    with Rig(images, nodes=NODES, line=FAR) as rig:
        rig.start_nodes()
        at_once(rig, start)
        check_read_once(rig)
        # They took turns: nobody read all of it, nor gave all of it.
        assert all(node.traffic().blob_bytes < 0.9 * images.size(PLAIN) for node in rig.nodes)
