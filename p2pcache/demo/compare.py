"""The order of the demo: an image, starts without p2pcache, starts with it.

Hides which bytes count as whose. The rule it keeps: what a node still reads after its client is
done is that node's, and only what the registry itself sent counts as read from it.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from p2pcache.demo.image import REPOSITORY, TAG, Image, build_image
from p2pcache.demo.nodes import Node, run_nodes
from p2pcache.demo.registry import Registry
from p2pcache.demo.replay import Outcome, Replay, ReplayError, open_session
from p2pcache.demo.report import NodeResult, Result

REGISTRY: Final = "demo.registry"
# One container's start. The slowest seen here took under 3 s.
_START_S: Final = 60.0
# How long the registry must be quiet after a start, and how long to wait for that.
_QUIET_S: Final = 0.3
_SETTLE_S: Final = 5.0
_POLL_S: Final = 0.05
_DIRECT: Final = "without p2pcache"


async def compare(count: int, delay_s: float, tell: Callable[[str], None]) -> Result:
    """Start the image without and with *count* nodes; *tell* what is going on meanwhile.

    Raises `NodeFailed`, `ReplayError`, `ImageError`. Leaves no process and no file behind.
    """
    begin = _now()
    tell("making an eStargz image of this machine's Python")
    image = await asyncio.to_thread(build_image)
    async with Registry({REPOSITORY: image.contents}, delay_s=delay_s) as registry:
        registry.phase = _DIRECT
        direct_begin = _now()
        direct_wrong: list[str] = []
        for i in range(count):
            tell(f"starting it without p2pcache, {i + 1} of {count}")
            outcome = await _start(image, registry.url, None)
            direct_wrong += outcome.mismatches
        direct_s = _now() - direct_begin
        direct = registry.total
        registry.phase = "nodes coming up"
        with tempfile.TemporaryDirectory(prefix="p2pcache-demo-") as folder:
            tell(f"waiting until {count} p2pcache nodes are ready")
            async with run_nodes(count, Path(folder), REGISTRY, registry.url) as nodes:
                results = []
                sent: list[int] = []
                for node in nodes:
                    tell(f"starting it on {node.name}, {len(sent) + 1} of {count}")
                    registry.phase = node.name
                    results.append(await _start_on(node, image, registry))
                    sent.append(registry.total - direct)
    return Result(
        image=f"{REGISTRY}/{REPOSITORY}:{TAG}",
        layers=image.layers,
        image_bytes=image.size,
        image_files=image.files,
        registry_delay_s=delay_s,
        upstream_bytes=sent[-1],
        upstream_bytes_one_node=sent[0],
        upstream_bytes_without_mirror=direct,
        seconds_without_mirror=direct_s,
        mismatches_without_mirror=tuple(direct_wrong),
        nodes=tuple(results),
        seconds=_now() - begin,
    )


async def _start_on(node: Node, image: Image, registry: Registry) -> NodeResult:
    begin = _now()
    try:
        outcome = await _start(image, node.mirror, REGISTRY)
    except ReplayError as error:
        raise node.failed(f"let the container's start fail: {error}") from error
    seconds = _now() - begin
    await _settle(registry)
    async with open_session() as session:
        counters = await node.read_counters(session)
    return NodeResult(
        node=node.name,
        requests=outcome.requests,
        requested_bytes=outcome.requested_bytes,
        served_local=counters.served_local,
        served_peer=counters.served_peer,
        served_upstream=counters.served_upstream,
        fetched_peer=counters.fetched_peer,
        fetched_upstream=counters.fetched_upstream,
        files=outcome.files,
        mismatches=tuple(outcome.mismatches),
        seconds=seconds,
    )


async def _start(image: Image, url: str, namespace: str | None) -> Outcome:
    try:
        async with open_session() as session, asyncio.timeout(_START_S):
            return await Replay(session, url, namespace, image.start_up).run()
    except TimeoutError as error:
        raise ReplayError(f"{url}: not started after {_START_S:.0f} s") from error


async def _settle(registry: Registry) -> None:
    """Return when nothing is asked of the *registry* any more, or after `_SETTLE_S`."""
    seen, quiet_since = registry.requests, _now()
    end = quiet_since + _SETTLE_S
    while _now() < end:
        await asyncio.sleep(_POLL_S)
        if registry.in_flight or registry.requests != seen:
            seen, quiet_since = registry.requests, _now()
        elif _now() - quiet_since >= _QUIET_S:
            return


def _now() -> float:
    return asyncio.get_running_loop().time()
