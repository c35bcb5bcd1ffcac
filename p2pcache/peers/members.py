"""Who is in the cluster, and what is known of each.

Hides greeting: every member is asked now and then who it is, which tells its zone, whether it is
leaving, and which of the listed addresses is this node's own. The rules: the list is the truth, so
that a member which does not answer stays one; everything works before the first answer, only less
well; a peer that lied is left alone for a growing time, one that failed for moments.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from p2pcache.config import Address, parse_address
from p2pcache.core.errors import IntegrityError, SourceBusy, SourceError, SourceLacksBlob
from p2pcache.core.placement import Member, Placement
from p2pcache.core.wire import Hello, NodeState
from p2pcache.metrics import Metrics
from p2pcache.peers.client import NotCoordinating, PeerClient
from p2pcache.peers.connections import Connections
from p2pcache.ports import Peer

logger = logging.getLogger(__name__)

GREET_EVERY_S: Final = 30.0
# In a large cluster each member is greeted less often: an idle node should use no processor.
_GREETINGS_PER_S: Final = 5.0
_MAX_GREETINGS: Final = 32
_JITTER: Final = 0.2
_FIRST_RETRY_S: Final = 1.0
_MAX_RETRY_S: Final = 60.0
# Greetings that fall due within so long are sent together, and what they told is used together:
# thousands of members answer at once after a start.
_TOGETHER_S: Final = 0.1
# A peer over its limits may be free again in the next moment.
_BUSY_S: Final = 0.05
MAX_STRANGERS: Final = 256
_RESOLVE_S: Final = 2.0


@dataclass(slots=True, eq=False)
class _Listed:
    """A member of the list."""

    peer: PeerClient
    due: float = 0.0
    zone: str = ""
    is_leaving: bool = False
    is_older: bool = False
    """It speaks no claims: a node of an earlier version, while a cluster is being updated."""
    failures: int = 0
    alias: str = ""
    """The address that it gives for itself, if that is not the listed one."""


class Members:
    """The nodes that *urls* list, and this one. *now* is Unix time.

    *own_id* recognises this node in the list. *own_address* is "" as long as it is not known; then
    it is taken to be where this machine stands as seen from the others, and *own_port*.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        own_id: str,
        own_address: str,
        own_port: int,
        own_zone: str,
        connections: Connections,
        secret: bytes | None,
        metrics: Metrics,
        now: Callable[[], float],
    ) -> None:
        self.own_address = own_address
        """What the other nodes call this one."""
        self.own_zone = own_zone
        self._own_port = own_port
        self._own_id = own_id
        self._is_leaving = False
        self._connections = connections
        self._secret = secret
        self._metrics = metrics
        self._now = now
        peers = map(self._client, urls)
        self._listed = {peer.address: _Listed(peer) for peer in peers}
        if own_address in self._listed:
            self._listed[own_address].peer.is_myself = True
        self._aliases: dict[str, PeerClient] = {}
        self._strangers: OrderedDict[str, PeerClient] = OrderedDict()
        self._rebuilding: asyncio.TimerHandle | None = None
        self.greeted = asyncio.Event()
        """Set once every member has been greeted, whether it answered or not."""
        self._random = random.Random(own_id)
        self.placement = Placement(self._members())
        """Who coordinates what. Another object after each change."""
        self.changed_at = time.monotonic()
        """When `placement` last changed, in monotonic time; the start counts as a change."""

    def _client(self, url: str) -> PeerClient:
        on_bytes = self._metrics.fetched_bytes["peer"].inc
        return PeerClient(url, self._connections, self._secret, self._now, on_bytes)

    def hello(self) -> Hello:
        """What this node answers to a greeting."""
        state = NodeState.LEAVING if self._is_leaving else NodeState.ACTIVE
        return Hello(self._own_id, self.own_zone, self.own_address, state)

    def leave(self) -> None:
        """Say from now on that this node is leaving."""
        self._is_leaving = True
        self._rebuild()

    def peer(self, address: str) -> PeerClient | None:
        """Return the peer at *address*; None for this node, and for what is no peer's address.

        A coordinator may know members that this node's list lacks: they are asked as well, if they
        can prove that they belong to the cluster.
        """
        if address == self.own_address:
            return None
        listed = self._listed.get(address)
        if listed is not None:
            return None if listed.peer.is_myself else listed.peer
        known = self._aliases.get(address) or self._strangers.get(address)
        if known is None:
            known = self._stranger(address)
        if address in self._strangers:
            self._strangers.move_to_end(address)
        return None if known is None or known.is_myself else known

    def _stranger(self, address: str) -> PeerClient | None:
        try:
            parsed = parse_address(address)
        except ValueError:
            return None
        # Another spelling would be another peer, with a clean record.
        if str(parsed) != address or not parsed.is_reachable:
            return None
        if self._secret is None and not parsed.is_loopback:
            return None
        peer = self._strangers[address] = self._client(f"http://{address}")
        while len(self._strangers) > MAX_STRANGERS:
            self._strangers.popitem(last=False)
        return peer

    def usable(self) -> list[PeerClient]:
        """The listed peers that may be asked now: none that is shunned, nor this node itself."""
        now = time.monotonic()
        peers = (listed.peer for listed in self._listed.values())
        return [peer for peer in peers if not peer.is_myself and peer.record.is_usable(now)]

    def note(self, peer: Peer, outcome: float | SourceError) -> None:
        """Remember a delivery, by its latency in seconds, or a failure.

        An `IntegrityError` is a lie: the peer is blamed and shunned.
        """
        if not isinstance(peer, PeerClient):
            raise TypeError(f"not a peer of this cluster: {peer!r}")
        now = time.monotonic()
        record = peer.record
        if isinstance(outcome, float):
            record.note_delivery(outcome)
        elif isinstance(outcome, IntegrityError):
            record.note_lie(outcome.reason, now)
            self._metrics.peer_blames.inc()
            logger.warning(
                "peer.blamed",
                extra={
                    "peer": peer.name,
                    "reason": outcome.reason,
                    "blames": record.blames,
                    "shunned_s": round(record.shunned_until - now),
                },
            )
        elif isinstance(outcome, SourceBusy):
            if record.is_usable(now):
                record.shunned_until, record.reason = now + _BUSY_S, outcome.reason
            logger.debug("peer.busy", extra={"peer": peer.name})
        elif isinstance(outcome, NotCoordinating):
            listed = self._listed.get(peer.address)
            if listed is not None:
                self._learn_age(listed, is_older=True)
        elif not isinstance(outcome, SourceLacksBlob):
            record.note_failure(outcome.reason, now)
            logger.info("peer.failed", extra={"peer": peer.name, "reason": outcome.reason})

    async def run(self) -> None:
        """Greet the members, at once and again and again, until cancelled.

        To be started when this node answers greetings itself: its own address is among them.
        """
        try:
            while True:
                try:
                    await self._round()
                except Exception:  # a bug ends here, logged: the list is the truth all the same
                    logger.exception("members.broken")
                    await asyncio.sleep(_FIRST_RETRY_S)
                    continue
                now = time.monotonic()
                due = min((listed.due for listed in self._others()), default=now + GREET_EVERY_S)
                await asyncio.sleep(max(_TOGETHER_S, due - now))
        finally:
            if self._rebuilding is not None:
                self._rebuilding.cancel()

    async def _round(self) -> None:
        """Greet those whose turn it is; find out after the first round who this node is."""
        soon = time.monotonic() + _TOGETHER_S
        await self._greet_all(iter([m for m in self._others() if m.due <= soon]))
        if not self.greeted.is_set():
            if not self.own_address:  # it is not in the list
                self.own_address = await self._seen_address()
            self._rebuild()
            self.greeted.set()

    async def _seen_address(self) -> str:
        """Return the address from which this machine would talk to the others; "" if to none."""
        loop = asyncio.get_running_loop()
        for listed in list(self._listed.values())[:_MAX_GREETINGS]:
            try:
                there = parse_address(listed.peer.address)
                async with asyncio.timeout(_RESOLVE_S):
                    # UDP: nothing is sent, but the route is chosen.
                    probe, _ = await loop.create_datagram_endpoint(
                        asyncio.DatagramProtocol, remote_addr=(there.host, there.port)
                    )
            except (OSError, TimeoutError, ValueError) as error:
                to = listed.peer.address
                logger.debug("members.no_route", extra={"to": to, "reason": str(error)})
                continue
            host = probe.get_extra_info("sockname")[0]
            probe.close()
            return str(Address(host, self._own_port))
        return ""

    def _others(self) -> Iterator[_Listed]:
        return (listed for listed in self._listed.values() if not listed.peer.is_myself)

    async def _greet_all(self, due: Iterator[_Listed]) -> None:
        async def greet_some() -> None:
            for listed in due:
                listed.due = time.monotonic() + _MAX_RETRY_S
                try:
                    await self._greet(listed)
                except Exception:  # a bug ends here, logged: the other members are greeted
                    logger.exception("greeting.broken", extra={"peer": listed.peer.name})

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(_MAX_GREETINGS, len(self._listed))):
                tasks.create_task(greet_some())

    async def _greet(self, listed: _Listed) -> None:
        interval = max(GREET_EVERY_S, len(self._listed) / _GREETINGS_PER_S)
        try:
            hello = await listed.peer.hello()
        except SourceError as error:
            self.note(listed.peer, error)
            wait = min(max(_MAX_RETRY_S, interval), _FIRST_RETRY_S * 2 ** min(listed.failures, 10))
            listed.failures += 1
        else:
            wait = interval
            listed.failures = 0
            listed.peer.record.answered_at = time.monotonic()
            self._learn_age(listed, is_older=hello is None)
            if hello is not None:
                self._learn(listed, hello)
        jitter = self._random.uniform(1 - _JITTER, 1 + _JITTER)
        listed.due = time.monotonic() + wait * jitter

    def _learn(self, listed: _Listed, hello: Hello) -> None:
        if hello.node == self._own_id:
            listed.peer.is_myself = True
            if not self.own_address:  # what this list calls it the other nodes' lists call it, too
                self.own_address = listed.peer.address
            logger.info("members.myself", extra={"address": listed.peer.address})
        listed.zone = hello.zone
        listed.is_leaving = hello.state is NodeState.LEAVING
        self._learn_alias(listed, hello.address)
        self._rebuild_soon()

    def _learn_age(self, listed: _Listed, *, is_older: bool) -> None:
        if is_older != listed.is_older:
            listed.is_older = is_older
            logger.info(
                "member.older" if is_older else "member.updated", extra={"peer": listed.peer.name}
            )
            self._rebuild_soon()

    def _learn_alias(self, listed: _Listed, alias: str) -> None:
        """Take *alias* for another name of a member, unless it is already somebody's."""
        if alias == listed.alias:
            return
        if listed.alias:
            self._aliases.pop(listed.alias, None)
            listed.alias = ""
        if alias and alias not in self._listed and alias not in (*self._aliases, self.own_address):
            self._strangers.pop(alias, None)
            self._aliases[alias] = listed.peer
            listed.alias = alias

    def _rebuild_soon(self) -> None:
        if self._rebuilding is None:
            loop = asyncio.get_running_loop()
            self._rebuilding = loop.call_later(_TOGETHER_S, self._rebuild)

    def _rebuild(self) -> None:
        if self._rebuilding is not None:
            self._rebuilding.cancel()
            self._rebuilding = None
        placement = Placement(self._members())
        if placement.members != self.placement.members:
            self.placement = placement
            self.changed_at = time.monotonic()

    def _members(self) -> Iterator[Member]:
        """Yield each member under the name that it gives for itself, as soon as that is known.

        Lists may spell one node in several ways, but all who greet it hear the same name.
        """
        if self.own_address:
            yield Member(self.own_address, self.own_zone, 0.0 if self._is_leaving else 1.0)
        for address, listed in self._listed.items():
            if not listed.peer.is_myself:
                is_out = listed.is_leaving or listed.is_older
                yield Member(listed.alias or address, listed.zone, 0.0 if is_out else 1.0)
