"""Builds a node from its configuration, runs it, and takes it down again in order.

The composition root: the only place that knows every part.
"""

from __future__ import annotations

import asyncio
import logging
import random
import resource
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final
from urllib.parse import urlsplit
from uuid import uuid4

import uvloop
from aiohttp import web

from p2pcache import __version__
from p2pcache.config import Address, Config
from p2pcache.content import Content, Overlay
from p2pcache.core.claims import Cut, cut_name
from p2pcache.core.coordinator import Coordinator
from p2pcache.core.errors import ConfigError, P2PCacheError
from p2pcache.core.layout import Layout, LayoutKind, PieceMask
from p2pcache.core.model import Digest
from p2pcache.logs import set_up_logging
from p2pcache.metrics import Metrics
from p2pcache.mirror.active import cut_of, given_pieces
from p2pcache.mirror.service import Mirror
from p2pcache.pacing import Pacer
from p2pcache.peers.connections import Connections
from p2pcache.peers.coordination import Coordination
from p2pcache.peers.locator import Locator
from p2pcache.peers.members import Members
from p2pcache.ports import BlobStore, StoredBlob
from p2pcache.server.listeners import Listener
from p2pcache.server.mirror_api import MirrorApi
from p2pcache.server.peer_api import PeerApi
from p2pcache.server.peer_path import PeerPathServer
from p2pcache.server.short_path import ShortPathServer
from p2pcache.server.status_api import StatusApi
from p2pcache.store import Store
from p2pcache.tasks import cancelled_at_exit
from p2pcache.upstream.client import Upstream
from p2pcache.upstream.endpoint import Patience, UpstreamConfig

logger = logging.getLogger(__name__)

# Proof is inflating and hashing, which let go of the interpreter lock.
_PROOF_THREADS: Final = 2
# Below the store's directory: which blobs of containerd's have been checked.
_CONTENT_RECORD: Final = "content.proofs"


def serve(config: Config) -> int:
    """Run a node until it is told to stop; return the exit status."""
    set_up_logging(config.log_format, config.log_level)
    _raise_file_limit()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config))
    except P2PCacheError as error:
        logger.error("node.failed", extra={"reason": str(error)})
        return 1
    return 0


def _raise_file_limit() -> None:
    """Let this process have as many descriptors open as it may: each connection takes one.

    The soft limit is low for the sake of programs that use select(2); setrlimit(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        logger.warning("files.limit", extra={"files": soft, "reason": str(error)})
    else:
        logger.info("files.limit", extra={"files": hard})


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
    members: Members
    clients: list[Listener]
    """The mirror's listeners."""
    peers: Listener
    status: Listener
    stopping: asyncio.Event
    """Set once it takes no more work."""

    async def drain(self, timeout_s: float) -> None:
        """Take no more work, let another process take the store over, finish what has begun."""
        self.stopping.set()
        self.members.leave()
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
async def open_node(
    config: Config,
    *,
    patience: Patience | None = None,
    wall_clock: Callable[[], float] = time.time,  # noqa: TID251 - for those who are handed the time
) -> AsyncIterator[Node]:
    """Build a node and have it listen. Raises `ConfigError` or `StoreError`.

    *patience* is what the node has with upstreams. *wall_clock* tells Unix time.
    """
    _check_peers(config)
    async with AsyncExitStack() as resources:
        metrics = Metrics()
        # Two machines may have one name; by this a node knows itself among its peers.
        node_id = f"{config.node_name}/{uuid4().hex[:12]}"
        listeners = _Listeners.on(config, resources)
        proofs = ThreadPoolExecutor(_PROOF_THREADS, thread_name_prefix="proof")
        resources.push_async_callback(
            asyncio.to_thread, proofs.shutdown, wait=True, cancel_futures=True
        )
        own_store = await resources.enter_async_context(Store(config.store, config.store_size))
        store: BlobStore = own_store
        content: Content | None = None
        changes: list[tuple[Digest, int, bool]] = []
        if config.containerd_content is not None:
            content = Content(config.containerd_content, config.store / _CONTENT_RECORD)
            content.on_change = lambda *change: changes.append(change)
            await resources.enter_async_context(content)
            store = await resources.enter_async_context(Overlay(own_store, content))
        uploads = Pacer(config.upload_limit, on_wait=metrics.paced_s["upload"].inc)
        downloads = Pacer(config.upstream_limit, on_wait=metrics.paced_s["upstream"].inc)
        upstream = await resources.enter_async_context(
            _upstream(config, metrics, downloads, patience or Patience())
        )
        connections = await resources.enter_async_context(Connections())
        tasks = await resources.enter_async_context(cancelled_at_exit())
        members = Members(
            config.peers,
            own_id=node_id,
            own_address=config.advertised(listeners.peers.address),
            own_port=listeners.peers.port,
            own_zone=config.zone,
            connections=connections,
            secret=config.cluster_secret,
            metrics=metrics,
            now=wall_clock,
        )
        rng = random.Random(node_id)
        coordination = Coordination(tasks, members, Coordinator(), metrics, rng)
        locator = Locator(tasks, members, coordination.handle, metrics, rng, own_id=node_id)
        mirror = Mirror(
            tasks,
            store,
            own_store.memory,
            locator,
            upstream,
            metrics,
            proofs,
            tag_max_age_s=config.tag_max_age_s,
            now=wall_clock,
        )
        peer_api = PeerApi(
            node_id,
            store,
            own_store.memory,
            metrics,
            config.cluster_secret,
            now=wall_clock,
            giver=mirror,
            coordination=coordination,
            hello=members.hello,
            uploads=uploads,
            max_uploads=config.max_uploads,
        )
        for listener in listeners.all:  # whoever asks is done before the parts go that answer
            resources.push_async_callback(listener.close, 1.0)
        stopping = asyncio.Event()

        def refresh() -> None:
            metrics.store_bytes.set(own_store.used)
            metrics.store_budget_bytes.set(own_store.budget)
            metrics.store_blobs.set(own_store.blob_count)
            metrics.paced_requests["upload"].set(uploads.waiting)
            metrics.paced_requests["upstream"].set(downloads.waiting)
            if content is not None:
                metrics.content_bytes.set(content.size)
                metrics.content_blobs.set(content.blob_count)

        checks = {"serving": lambda: not stopping.is_set()}
        status_api = StatusApi(metrics, checks, refresh)
        await listeners.peers.open(
            PeerPathServer(
                peer_api.handle, store, peer_api.uploads, config.cluster_secret, now=wall_clock
            )
        )
        for registry, listener in listeners.clients.items():
            api = MirrorApi(mirror, metrics, registry)
            await listener.open(ShortPathServer(api.handle, store, metrics, api.repository_of))
        await listeners.status.open(web.Server(status_api.handle, access_log=None))
        tasks.create_task(members.run())
        tasks.create_task(locator.run())
        tasks.create_task(locator.announce_all(_holdings(own_store)))
        own_store.on_change = partial(_announce_rest, locator, store)
        if content is not None:
            content.on_change = partial(_announce_whole, locator)
            for change in changes:  # what was found before there was anybody to tell
                content.on_change(*change)
        logger.info(
            "node.ready",
            extra={
                "version": __version__,
                "node": node_id,
                "mirror": str(config.mirror_listen),
                "peers": str(listeners.peers.address),
                "advertised": members.own_address,
                "zone": config.zone,
                "status": str(config.status_listen),
                "known_peers": len(config.peers),
                "store": str(config.store),
                "store_blobs": own_store.blob_count,
                "store_bytes": own_store.used,
            },
        )
        clients = list(listeners.clients.values())
        yield Node(
            own_store, metrics, members, clients, listeners.peers, listeners.status, stopping
        )


@dataclass(slots=True)
class _Listeners:
    """All sockets of a node."""

    clients: dict[str | None, Listener]
    """The mirror's: for clients that say which registry they mean, and for those of one registry"""
    peers: Listener
    status: Listener

    @classmethod
    def on(cls, config: Config, resources: AsyncExitStack) -> _Listeners:
        """Listen everywhere; *resources* closes. Raises `ConfigError` if an address is taken."""

        def listener(address: Address) -> Listener:
            found = Listener(address)
            resources.callback(found.release)
            return found

        clients: dict[str | None, Listener] = {None: listener(config.mirror_listen)}
        clients |= {host: listener(address) for host, address in config.mirror_for.items()}
        return cls(clients, listener(_peer_address(config)), listener(config.status_listen))

    @property
    def all(self) -> list[Listener]:
        """Every one of them."""
        return [*self.clients.values(), self.peers, self.status]


def _upstream(config: Config, metrics: Metrics, pacer: Pacer, patience: Patience) -> Upstream:
    return Upstream(
        UpstreamConfig(
            endpoints=config.upstream,
            ca_file=config.upstream_ca,
            registry_config=config.registry_config,
            patience=patience,
        ),
        on_bytes=lambda registry, count: metrics.fetched_bytes["upstream"].inc(count),
        pacer=pacer,
    )


def _holdings(store: Store) -> Iterator[tuple[Cut, PieceMask]]:
    """Everything in the store that peers may have, for those who coordinate it."""
    for stored in store.blobs():
        yield from ((cut, given) for cut, given in _given(stored) if given)


def _given(stored: StoredBlob) -> Iterator[tuple[Cut, PieceMask]]:
    """Yield each way in which a blob is announced, with what peers may have of it, or nothing."""
    given = given_pieces(stored)
    yield cut_of(stored), given
    if stored.toc_digest is not None:
        has_tail = stored.layout.count - 1 in given
        yield Cut.of_tail(stored.digest, stored.toc_digest), PieceMask(1, int(has_tail))


def _announce_rest(locator: Locator, store: BlobStore, changed: StoredBlob) -> None:
    """Tell what is left of a blob of which our own store has lost something, or all."""
    found = store.find(changed.digest)  # perhaps containerd's, or one that took its place
    left = {} if found is None else dict(_given(found))
    for cut, given in _given(changed):
        locator.announce_rest(cut, left.get(cut, given))


def _announce_whole(locator: Locator, digest: Digest, size: int, is_there: bool) -> None:
    """Tell of a blob that containerd has, or has no more."""
    count = Layout.fixed(size).count
    held = PieceMask.full(count) if is_there else PieceMask(count)
    cut = Cut(digest, cut_name(LayoutKind.FIXED, None), count, passes_on=False)
    locator.announce(cut, held, PieceMask(count))


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
