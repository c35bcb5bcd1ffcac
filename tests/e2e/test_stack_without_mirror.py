"""The rig's own proof: without p2pcache, containers run lazily straight from the registry."""

import pytest

from tests.e2e.images import GZIP, PLAIN, ZSTD, unforeseen
from tests.e2e.rig import FAR, Rig, lazy_start
from tests.e2e.services import Snapshotter

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(480)]

LAZY_SHARE = 0.6


@pytest.mark.parametrize("tag", [GZIP, ZSTD])
@pytest.mark.parametrize(
    "snapshotter",
    [Snapshotter("0.12"), Snapshotter("0.18"), Snapshotter("0.18", hosts="hosts-dir")],
    ids=["0.12", "0.18", "0.18-hosts-dir"],
)
def test_containers_run_lazily_straight_from_the_registry(images, snapshotter, tag):
    with Rig(images, nodes=1, snapshotter=snapshotter) as rig:
        rig.start_nodes(mirrors=False)
        (node,) = rig.nodes
        assert lazy_start(node, tag).output.startswith("started")
        assert node.run(tag, unforeseen()) == images.unforeseen_output
        traffic = node.traffic()
        assert 0 < traffic.blob_bytes < LAZY_SHARE * images.size(tag)
        assert traffic.past_the_mirror == traffic.requests


def test_plain_images_are_pulled_whole(images):
    with Rig(images, nodes=1) as rig:
        rig.start_nodes(mirrors=False)
        (node,) = rig.nodes
        node.pull(PLAIN)
        assert node.run_pulled(PLAIN, unforeseen()) == images.unforeseen_output
        assert node.traffic().blob_bytes >= images.size(PLAIN)


def test_far_registry_slows_a_lazy_start_down(images):
    with Rig(images, nodes=1) as near, Rig(images, nodes=1, line=FAR) as far:
        for rig in (near, far):
            rig.start_nodes(mirrors=False)
        quick, slow = (lazy_start(rig.nodes[0]) for rig in (near, far))
        assert slow.upstream_bytes == quick.upstream_bytes
        # The line alone takes this long to carry the bytes.
        assert slow.total_s > slow.upstream_bytes / FAR.bytes_per_s
