"""A peer whose bytes are damaged on the way: containers never see it, and the peer is blamed."""

import sys
from pathlib import Path

import pytest

from tests.e2e.images import GZIP, PLAIN, ZSTD, unforeseen
from tests.e2e.mirrors import PEER_PORT, Setup
from tests.e2e.rig import Node, Rig, lazy_start
from tests.e2e.services import Snapshotter

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(480)]

RELAY = Path(__file__).parent / "wrong_bytes.py"
BAD_ADDRESS, GOOD_ADDRESS = "10.231.0.30", "10.231.0.31"
GOOD_DELAY_S = 0.02
UPSTREAM_SHARE = 0.05


def start_with_bad_peer(rig: Rig, *, every: int) -> Path:
    """Start three nodes. What the third hears from the first goes through a relay that flips a bit
    in every *every*-th body; the second is honest but slower, so that the bad one is asked.

    The first two call themselves by the addresses of their relays: no node has two names.
    """
    first, second, third = rig.nodes
    far = [f"http://{address}:{PEER_PORT}" for address in (BAD_ADDRESS, GOOD_ADDRESS)]
    for node, address, other in ((first, BAD_ADDRESS, second), (second, GOOD_ADDRESS, first)):
        flags = ["--advertise", f"{address}:{PEER_PORT}"]
        node.start(Setup(peers=[other.mirror.url, third.mirror.url], flags=flags))
    bad = start_relay(rig, first, BAD_ADDRESS, "--every", str(every))
    start_relay(rig, second, GOOD_ADDRESS, "--every", "0", "--delay", str(GOOD_DELAY_S))
    third.start(Setup(peers=far))
    return bad


def start_relay(rig: Rig, to: Node, address: str, *flags: str) -> Path:
    """Start a relay to a node's peer port on a machine of its own; return its log."""
    machine = rig.machine(f"relay-{address.rpartition('.')[2]}", address)
    log = machine.log_of("relay")
    machine.start(
        "relay",
        *(sys.executable, str(RELAY), "--listen", f"{address}:{PEER_PORT}"),
        *("--to", f"{to.machine.address}:{PEER_PORT}", *flags),
        ready=lambda: "listening" in log.read_text(),
    )
    return log


@pytest.mark.parametrize(
    "every",
    [
        pytest.param(1, id="in-the-table-of-contents"),  # what is read of a lazy layer first
        pytest.param(4, id="in-a-file"),  # after the tables of two layers
    ],
)
@pytest.mark.parametrize(("version", "tag"), [("0.18", GZIP), ("0.12", ZSTD)])
def test_flipped_bits_never_reach_a_container(images, version, tag, every):
    with Rig(images, nodes=3, snapshotter=Snapshotter(version)) as rig:
        relay_log = start_with_bad_peer(rig, every=every)
        for node in rig.nodes:
            assert lazy_start(node, tag).output.startswith("started")
            assert node.run(tag, unforeseen()) == images.unforeseen_output
        third = rig.nodes[2]
        assert_blamed(third, relay_log)
        asked = sum(third.mirror.served_bytes().values())
        assert third.traffic().bytes <= UPSTREAM_SHARE * asked
        assert not third.traffic().past_the_mirror


def test_flipped_bits_never_reach_a_whole_layer(images):
    with Rig(images, nodes=3) as rig:
        relay_log = start_with_bad_peer(rig, every=2)
        for node in rig.nodes:
            node.pull(PLAIN)
        third = rig.nodes[2]
        assert third.run_pulled(PLAIN, unforeseen()) == images.unforeseen_output
        assert_blamed(third, relay_log)
        assert not third.traffic().past_the_mirror


def assert_blamed(node: Node, relay_log: Path) -> None:
    assert "flipped" in relay_log.read_text(), "the relay was not asked for content"
    assert node.mirror.total("p2pcache_peer_blames_total") > 0
    assert "peer.blamed" in node.mirror.logs()
