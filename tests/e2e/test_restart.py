"""Replacing p2pcache under running containers."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.images import GZIP, long_reading, unforeseen
from tests.e2e.mirrors import Setup
from tests.e2e.rig import Rig, lazy_start

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(480)]

PAUSE_S = 0.02
"""Between two of some 540 files: over ten seconds of reading."""
DRAIN_LIMIT_S = 40.0


def test_a_container_reads_on_while_one_process_hands_over_to_the_next(images):
    with Rig(images) as rig, ThreadPoolExecutor(1) as pool:
        rig.start_nodes()
        first, second = rig.nodes
        lazy_start(first)
        second.pull_lazily(GZIP)
        (old,) = second.mirror.processes
        reading = pool.submit(second.run, GZIP, long_reading(PAUSE_S))
        new = second.mirror.start(Setup(peers=[first.mirror.url]))
        assert not reading.done(), "the container was too quick for the test"
        assert old.terminate(timeout_s=DRAIN_LIMIT_S) == 0
        assert not reading.done(), "the container was too quick for the test"
        assert reading.result() == images.long_output
        assert new.is_running()
        assert sum(second.mirror.served_bytes().values()) > 0, "the new process served nothing"
        assert not second.traffic().past_the_mirror


def test_what_was_read_before_a_crash_is_still_held(images):
    with Rig(images, nodes=1) as rig:
        rig.start_nodes()
        (node,) = rig.nodes
        lazy_start(node)
        assert node.run(GZIP, unforeseen()) == images.unforeseen_output
        (old,) = node.mirror.processes
        old.kill()
        node.mirror.start(Setup())
        read_before = node.traffic().blob_bytes
        node.forget()
        node.pull_lazily(GZIP)
        assert node.run(GZIP, unforeseen()) == images.unforeseen_output
        assert node.traffic().blob_bytes - read_before <= 0.05 * read_before
