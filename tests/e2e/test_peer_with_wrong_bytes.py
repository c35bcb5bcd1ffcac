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


def start_with_bad_peer(rig: Rig, *, every: int) -> tuple[Node, Node, Path]:
    """Start both nodes. The second knows two ways to the first: a relay that flips a bit in every
    *every*-th body, and an honest one, which is slower, so that the bad one is asked.
    """
    first, second = rig.nodes
    first.start(Setup())
    bad = start_relay(rig, first, BAD_ADDRESS, "--every", str(every))
    start_relay(rig, first, GOOD_ADDRESS, "--every", "0", "--delay", str(GOOD_DELAY_S))
    peers = [f"http://{address}:{PEER_PORT}" for address in (BAD_ADDRESS, GOOD_ADDRESS)]
    second.start(Setup(peers=peers))
    return first, second, bad


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
    with Rig(images, snapshotter=Snapshotter(version)) as rig:
        first, second, relay_log = start_with_bad_peer(rig, every=every)
        lazy_start(first, tag)
        assert first.run(tag, unforeseen()) == images.unforeseen_output
        assert lazy_start(second, tag).output.startswith("started")
        assert second.run(tag, unforeseen()) == images.unforeseen_output
        assert_blamed(second, relay_log)
        asked = sum(second.mirror.served_bytes().values())
        assert second.traffic().bytes <= UPSTREAM_SHARE * asked
        assert not second.traffic().past_the_mirror


def test_flipped_bits_never_reach_a_whole_layer(images):
    with Rig(images) as rig:
        first, second, relay_log = start_with_bad_peer(rig, every=2)
        first.pull(PLAIN)
        second.pull(PLAIN)
        assert second.run_pulled(PLAIN, unforeseen()) == images.unforeseen_output
        assert_blamed(second, relay_log)
        assert not second.traffic().past_the_mirror


def assert_blamed(node: Node, relay_log: Path) -> None:
    assert "flipped" in relay_log.read_text(), "the relay was not asked for content"
    assert node.mirror.total("p2pcache_peer_blames_total") > 0
    assert "peer.blamed" in node.mirror.logs()
