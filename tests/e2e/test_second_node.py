"""What p2pcache promises: the second node reads from the first one, not from the registry."""

import pytest

from tests.e2e.images import GZIP, PLAIN, ZSTD, unforeseen
from tests.e2e.rig import Rig, lazy_start
from tests.e2e.services import Snapshotter

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(480)]

PARTLY_HELD = 0.6
"""The share of the image that the first node may have read: the rest nobody holds."""
UPSTREAM_SHARE = 0.05


@pytest.mark.parametrize("tag", [GZIP, ZSTD])
@pytest.mark.parametrize(
    "snapshotter",
    [Snapshotter("0.12"), Snapshotter("0.18"), Snapshotter("0.18", hosts="hosts-dir")],
    ids=["0.12", "0.18", "0.18-hosts-dir"],
)
def test_second_node_reads_from_the_first(images, snapshotter, tag):
    with Rig(images, snapshotter=snapshotter) as rig:
        rig.start_nodes()
        first, second = rig.nodes
        assert lazy_start(first, tag).output.startswith("started")
        assert first.run(tag, unforeseen()) == images.unforeseen_output
        assert 0 < first.traffic().blob_bytes < PARTLY_HELD * images.size(tag)

        second.pull_lazily(tag)
        assert second.run(tag, unforeseen()) == images.unforeseen_output

        served = second.mirror.served_bytes()
        assert second.traffic().bytes <= UPSTREAM_SHARE * sum(served.values())
        assert served["peer"] > 0
        assert first.mirror.total("p2pcache_peer_served_bytes_total") > 0
        assert first.traffic().blob_bytes < PARTLY_HELD * images.size(tag)
        for node in rig.nodes:
            assert not node.traffic().past_the_mirror


def test_second_node_starts_while_the_registry_is_down(images):
    with Rig(images) as rig:
        rig.start_nodes()
        first, second = rig.nodes
        lazy_start(first)
        assert first.run(GZIP, unforeseen()) == images.unforeseen_output
        rig.registry.stop()
        second.pull_lazily(GZIP)
        assert second.run(GZIP).startswith("started")
        assert second.run(GZIP, unforeseen()) == images.unforeseen_output


def test_second_node_pulls_whole_layers_from_the_first(images):
    with Rig(images) as rig:
        rig.start_nodes()
        first, second = rig.nodes
        first.pull(PLAIN)
        assert not first.traffic().past_the_mirror
        second.pull(PLAIN)
        assert second.run_pulled(PLAIN, unforeseen()) == images.unforeseen_output
        assert second.traffic().bytes <= UPSTREAM_SHARE * images.size(PLAIN)
        given = first.mirror.total("p2pcache_peer_served_bytes_total")
        assert given >= (1 - UPSTREAM_SHARE) * images.size(PLAIN)
