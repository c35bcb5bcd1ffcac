"""No integration test lets the node's own code block the event loop."""

from collections.abc import Iterator

import pytest
from blockbuster import blockbuster_ctx


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """Fail a test in which p2pcache waits for a file, a lock or the clock on the event loop.

    ``pread`` of held bytes is not among what it looks for: that is done on the loop on purpose,
    and so is ``sendfile`` to a socket that never blocks.
    The demo is no node: its loop serves nobody while it writes a file.
    """
    with blockbuster_ctx("p2pcache", excluded_modules=["p2pcache.demo"]) as blockbuster:
        blockbuster.functions["os.sendfile"].deactivate()
        yield
