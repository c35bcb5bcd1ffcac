"""Builds a node from its configuration, runs it, and takes it down again in order.

The composition root: the only place that knows every part.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit
from uuid import uuid4

import uvloop
from aiohttp import web

from p2pcache import __version__
from p2pcache.config import Address, Config
from p2pcache.core.errors import ConfigError, P2PCacheError
from p2pcache.logs import set_up_logging
from p2pcache.metrics import Metrics
from p2pcache.mirror.service import Mirror
from p2pcache.peers.client import peer_session
from p2pcache.peers.neighbours import StaticNeighbours
from p2pcache.server.listeners import Listener
from p2pcache.server.mirror_api import MirrorApi
from p2pcache.server.peer_api import PeerApi
from p2pcache.server.short_path import ShortPathServer
from p2pcache.server.status_api import StatusApi
from p2pcache.store import Store
from p2pcache.tasks import cancelled_at_exit
from p2pcache.upstream.client import Upstream
from p2pcache.upstream.endpoint import Patience, UpstreamConfig

logger = logging.getLogger(__name__)

# Proof is inflating and hashing, which let go of the interpreter lock.
_PROOF_THREADS: Final = 2


def serve(config: Config) -> int:
    """Run a node until it is told to stop; return the exit status."""
    set_up_logging(config.log_format, config.log_level)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config))
    except P2PCacheError as error:
        logger.error("node.failed", extra={"reason": str(error)})
        return 1
    return 0


async def _serve(config: Config) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with open_node(config) as node:
        await stop.wait()
        logger.info("node.stopping")
        await node.drain(config.drain_timeout_s)
    logger.info("node.stopped")


@dataclass(slots=True)
class Node:
    """A running node."""

    store: Store
    metrics: Metrics
    clients: list[Listener]
    """The mirror's listeners."""
    peers: Listener
    status: Listener
    stopping: asyncio.Event
    """Set once it takes no more work."""

    async def drain(self, timeout_s: float) -> None:
        """Take no more work, let another process take the store over, finish what has begun."""
        self.stopping.set()
        # First: probes that knock from now on reach the process that takes over, if there is one.
        self.status.stop_accepting()
        self.store.release_writer()
        listeners = [*self.clients, self.peers]
        for listener in listeners:
            listener.stop_accepting()
        async with asyncio.TaskGroup() as tasks:
            for listener in listeners:
                tasks.create_task(listener.close(timeout_s))


@asynccontextmanager
async def open_node(config: Config, *, patience: Patience | None = None) -> AsyncIterator[Node]:
    """Build a node and have it listen. Raises `ConfigError` or `StoreError`.

    *patience* is what the node has with upstreams.
    """
    _check_peers(config)
    async with AsyncExitStack() as resources:
        metrics = Metrics()
        # Two machines may have one name; by this a node knows itself among its peers.
        node_id = f"{config.node_name}/{uuid4().hex[:12]}"
        proofs = ThreadPoolExecutor(_PROOF_THREADS, thread_name_prefix="proof")
        resources.push_async_callback(
            asyncio.to_thread, proofs.shutdown, wait=True, cancel_futures=True
        )
        store = await resources.enter_async_context(Store(config.store, config.store_size))
        session = await resources.enter_async_context(peer_session())
        upstream = await resources.enter_async_context(
            Upstream(
                UpstreamConfig(
                    endpoints=config.upstream,
                    ca_file=config.upstream_ca,
                    registry_config=config.registry_config,
                    patience=patience or Patience(),
                ),
                on_bytes=lambda registry, count: metrics.fetched_bytes["upstream"].inc(count),
            )
        )
        tasks = await resources.enter_async_context(cancelled_at_exit())
        wall_clock = time.time  # noqa: TID251 - handed to those who take the time as an argument
        neighbours = StaticNeighbours(
            config.peers,
            node_id,
            session,
            config.cluster_secret,
            metrics,
            now=wall_clock,
        )
        mirror = Mirror(
            tasks,
            store,
            store.memory,
            neighbours,
            upstream,
            metrics,
            proofs,
            tag_max_age_s=config.tag_max_age_s,
            now=wall_clock,
        )
        clients: list[Listener] = []
        for registry, address in [(None, config.mirror_listen), *config.mirror_for.items()]:
            api = MirrorApi(mirror, metrics, registry)
            server = ShortPathServer(api.handle, store, metrics, api.repository_of)
            clients.append(Listener(address, server))
        peer_api = PeerApi(
            node_id,
            store,
            store.memory,
            metrics,
            config.cluster_secret,
            now=wall_clock,
        )
        peers = Listener(_peer_address(config), web.Server(peer_api.handle, access_log=None))

        stopping = asyncio.Event()

        def refresh() -> None:
            metrics.store_bytes.set(store.used)
            metrics.store_budget_bytes.set(store.budget)
            metrics.store_blobs.set(store.blob_count)

        checks = {"serving": lambda: not stopping.is_set()}
        status_api = StatusApi(metrics, checks, refresh)
        status = Listener(config.status_listen, web.Server(status_api.handle, access_log=None))
        node = Node(store, metrics, clients, peers, status, stopping)
        for listener in (*clients, peers, status):
            resources.push_async_callback(listener.close, 1.0)
            await listener.open()
        logger.info(
            "node.ready",
            extra={
                "version": __version__,
                "node": node_id,
                "mirror": str(config.mirror_listen),
                "peers": str(peers.address),
                "status": str(config.status_listen),
                "known_peers": len(config.peers),
                "store": str(config.store),
                "store_blobs": store.blob_count,
                "store_bytes": store.used,
            },
        )
        yield node


def _check_peers(config: Config) -> None:
    """Raise `ConfigError` if what other machines say would be believed without proof."""
    hosts = {url: urlsplit(url).hostname or "" for url in config.peers}
    unproven = [url for url, host in hosts.items() if not Address(host, 0).is_loopback]
    if unproven and config.cluster_secret is None:
        raise ConfigError(
            [
                f"--peer {url}: another machine is only asked with --cluster-secret-file, "
                "the same on all nodes; make one with: openssl rand -hex 32"
                for url in unproven
            ]
        )


def _peer_address(config: Config) -> Address:
    """Where peers are served: without a secret only to this machine."""
    address = config.peer_listen
    if config.cluster_secret is not None or address.is_loopback:
        return address
    logger.warning(
        "peers.loopback_only",
        extra={"hint": "give all nodes the same --cluster-secret-file to share between them"},
    )
    return Address("::1" if ":" in address.host else "127.0.0.1", address.port)
