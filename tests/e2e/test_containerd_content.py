"""What containerd has already is shared from where it lies: not read again, not kept twice."""

import pytest

from tests.e2e.images import PLAIN, unforeseen
from tests.e2e.machines import wait_until
from tests.e2e.mirrors import Setup
from tests.e2e.rig import Node, Rig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(480)]

MANIFESTS_BYTES = 64 << 10
"""More than the image's manifests take: they are remembered, wherever they come from."""


def start(rig: Rig) -> tuple[Node, Node]:
    """Start both nodes; only the first one is told of its containerd, which is not there yet."""
    first, second = rig.nodes
    assert not first.content.exists()
    first.start(Setup(flags=["--containerd-content", str(first.content)]))
    second.start(Setup(peers=[first.mirror.url]))
    return first, second


def until_proven(node: Node, size: int) -> None:
    wait_until(
        "what containerd has to be proven",
        lambda: node.mirror.total("p2pcache_content_bytes") >= size,
        timeout_s=60,
    )


def test_layers_that_containerd_pulled_by_itself_are_shared_without_being_kept(images):
    with Rig(images) as rig:
        first, second = start(rig)
        first.pull_past_the_mirror(PLAIN)
        until_proven(first, images.size(PLAIN))
        read_before = first.traffic().requests

        second.pull(PLAIN)
        assert second.run_pulled(PLAIN, unforeseen()) == images.unforeseen_output
        assert second.traffic().blob_bytes == 0
        assert first.mirror.total("p2pcache_peer_served_bytes_total") >= images.size(PLAIN)
        assert first.traffic().requests == read_before
        assert first.mirror.total("p2pcache_store_bytes") == 0

        # The same for clients of its own: another containerd, which has nothing yet.
        first.forget()
        first.pull(PLAIN)
        assert first.run_pulled(PLAIN, unforeseen()) == images.unforeseen_output
        blobs_before = sum(r.written for r in read_before if "/blobs/" in r.path)
        assert first.traffic().blob_bytes == blobs_before
        assert first.mirror.served_bytes()["local"] >= images.size(PLAIN)
        assert first.mirror.total("p2pcache_store_bytes") < MANIFESTS_BYTES


def test_what_containerd_throws_away_is_read_from_the_registry_again(images):
    with Rig(images) as rig:
        first, second = start(rig)
        first.pull_past_the_mirror(PLAIN)
        until_proven(first, images.size(PLAIN))
        first.remove(PLAIN)
        wait_until(
            "what containerd threw away to be forgotten",
            lambda: first.mirror.total("p2pcache_content_blobs") == 0,
            timeout_s=60,
        )
        second.pull(PLAIN)
        assert second.run_pulled(PLAIN, unforeseen()) == images.unforeseen_output
        assert second.traffic().blob_bytes >= images.size(PLAIN)
