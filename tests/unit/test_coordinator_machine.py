"""Nodes, one coordinator, and everything that may go wrong between them, in any order.

The nodes are simple, and as unreliable as the rules allow. What is checked is seen from outside,
as leases and sources that were named, and inside, as books that must balance.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2pcache.core.bounds import LEASE_S, MIN_LEASE_AGE_S, STALL_S
from p2pcache.core.claims import Claim, RegionKey
from p2pcache.core.coordinator import Coordinator
from p2pcache.core.model import Digest

KEY = RegionKey(Digest.of(b"layer"), "fixed", 0)
COUNT = 5
ALL = (1 << COUNT) - 1
NODES = 6
UPSTREAM = "the upstream"


def bits(mask):
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def mask_of(pieces):
    return sum(1 << i for i in set(pieces))


@dataclass
class Node:
    address: str
    passes_on: bool = True
    is_alive: bool = True
    held: int = 0
    fetching: dict[int, tuple[str, float]] = field(default_factory=dict)
    """By piece: from whom, and since when."""
    failed: dict[str, int] = field(default_factory=dict)
    stalled: dict[str, int] = field(default_factory=dict)

    def claim(self, limit):
        wanted = ALL & ~self.held & ~mask_of(self.fetching)
        return Claim(
            KEY,
            self.held,
            mask_of(self.fetching),
            wanted,
            limit,
            self.passes_on,
            tuple(self.failed.items()),
            tuple(self.stalled.items()),
        )

    def accept(self, grant, now):
        self.failed, self.stalled = {}, {}
        for piece in bits(grant.leased):
            self.fetching[piece] = (UPSTREAM, now)
        for source in grant.sources:
            for piece in bits(source.mask):
                self.fetching.setdefault(piece, (source.address, now))

    def gives(self, piece):
        """It has the piece, or is getting it and will pass it on."""
        if self.held >> piece & 1:
            return True
        source = self.fetching.get(piece)
        return source is not None and (self.passes_on or source[0] == UPSTREAM)


class Cluster:
    """The nodes and the coordinator, and the leases as seen from outside."""

    def __init__(self, count=NODES, passes_on=True):
        self.now = 1000.0
        self.coordinator = Coordinator()
        self.nodes = {f"n{i}": Node(f"n{i}", passes_on) for i in range(count)}
        self.leases: dict[int, tuple[str, float, float]] = {}
        self.reads = 0
        self.claims = 0

    def say(self, node, limit=COUNT, *, lost=False):
        claim = node.claim(limit)
        for address, mask in claim.failed:
            for piece in bits(mask):
                if self.leases.get(piece, ("",))[0] == address:
                    del self.leases[piece]
        for piece, (holder, granted_at, renewed_at) in list(self.leases.items()):
            if holder == node.address:
                is_silent = self.now - renewed_at >= LEASE_S
                if not is_silent and (claim.fetching | claim.wanted) >> piece & 1:
                    self.leases[piece] = (holder, granted_at, self.now)
                else:
                    del self.leases[piece]
        grant = self.coordinator.answer(node.address, claim, self.now)
        self.claims += 1
        self.check(node, claim, grant)
        if not lost:
            self.reads += grant.leased.bit_count()
            node.accept(grant, self.now)

    def check(self, node, claim, grant):
        assert not grant.leased & ~claim.wanted
        for piece in bits(grant.leased):
            holder, granted_at, renewed_at = self.leases.get(piece, (node.address, 0.0, 0.0))
            is_live = self.now - renewed_at < LEASE_S and self.now - granted_at < MIN_LEASE_AGE_S
            assert holder == node.address or not is_live, "two live leases"
            if holder != node.address or granted_at == 0.0:
                self.leases[piece] = (node.address, self.now, self.now)
        for piece in bits(claim.wanted & ~grant.leased):
            if self.leases.get(piece, ("",))[0] == node.address:
                del self.leases[piece]
        named = 0
        for source in grant.sources:
            assert source.address not in (node.address, "")
            assert source.mask
            assert not source.mask & ~claim.wanted
            assert not source.mask & grant.leased
            for address, mask in claim.failed:
                assert address != source.address or not mask & source.mask
            named |= source.mask
        if claim.wanted & ~named & ~grant.leased:
            assert grant.retry_s > 0
        else:
            assert grant.retry_s == 0

    def work(self, node, piece):
        """Bytes come, or it shows that none will."""
        address, since = node.fetching[piece]
        source = self.nodes.get(address)
        if address == UPSTREAM or (source and source.is_alive and source.held >> piece & 1):
            del node.fetching[piece]
            node.held |= 1 << piece
        elif source is None or not source.is_alive or not source.gives(piece):
            del node.fetching[piece]
            node.failed[address] = node.failed.get(address, 0) | 1 << piece
        elif self.now - since >= STALL_S:
            self.doubt(node, piece)

    def doubt(self, node, piece):
        address, _ = node.fetching.pop(piece)
        node.stalled[address] = node.stalled.get(address, 0) | 1 << piece

    def finish(self, rounds=60):
        """Nothing goes wrong any more: how many rounds until all have everything."""
        for i in range(rounds):
            living = [node for node in self.nodes.values() if node.is_alive]
            if all(node.held == ALL for node in living):
                return i
            for node in living:
                self.say(node)
            for node in living:
                for piece in list(node.fetching):
                    self.work(node, piece)
            self.now += 0.3
        raise AssertionError(f"not all have everything after {rounds} rounds")


def check_books(coordinator):
    """Every link has two ends, every load is right, and there is no circle."""
    loads: dict[str, int] = {}
    nodes = 0
    for region in coordinator._regions.values():
        nodes += len(region.members)
        leased = 0
        for member in region.members.values():
            assert not leased & member.leased
            leased |= member.leased
            assert bool(member.leases) == (member in region.lessees)
            offers = bool(member.held or member.fetching)
            assert offers == (member.bucket is not None)
            if member.bucket is not None:
                assert member.bucket is region._buckets[member.load]
            for source, part in member.sources.items():
                assert part
                assert member in source.waiters
                assert region.members[source.address] is source
                loads[source.address] = loads.get(source.address, 0) + 1
            for waiter in member.waiters:
                assert member in waiter.sources
            for piece in range(COUNT):
                check_no_circle(member, piece)
        assert sum(len(bucket) for bucket in region._buckets) <= len(region.members)
        ghosts = sum(member.ghosts for member in region.members.values())
        assert ghosts <= len(region._ghosts)
    assert loads == dict(coordinator._loads)
    assert nodes == coordinator.nodes


def check_no_circle(member, piece):
    way = {member}
    while not member.held >> piece & 1:
        above = [s for s, part in member.sources.items() if part >> piece & 1]
        assert len(above) <= 1
        if not above:
            return
        member = above[0]
        assert member not in way, "a circle"
        way.add(member)


ADDRESSES = st.sampled_from([f"n{i}" for i in range(NODES)])
PIECES = st.integers(0, COUNT - 1)
MASKS = st.integers(0, ALL)


class Storm(RuleBasedStateMachine):
    @initialize(passes_on=st.booleans())
    def start(self, passes_on):
        self.cluster = Cluster(passes_on=passes_on)

    @property
    def coordinator(self):
        return self.cluster.coordinator

    @rule(address=ADDRESSES, limit=st.integers(0, COUNT), lost=st.booleans())
    def claims(self, address, limit, *, lost):
        node = self.cluster.nodes[address]
        if node.is_alive:
            self.cluster.say(node, limit, lost=lost)

    @rule(limit=st.integers(0, COUNT), order=st.permutations(range(NODES)))
    def all_claim(self, limit, order):
        for i in order:
            self.claims(f"n{i}", limit, lost=False)

    @rule(piece=PIECES, address=ADDRESSES, limit=st.integers(0, 1))
    def stalls_and_asks_again(self, address, piece, limit):
        self.stalls(address, piece)
        self.claims(address, limit, lost=False)

    @rule(address=ADDRESSES)
    def works(self, address):
        node = self.cluster.nodes[address]
        for piece in list(node.fetching):
            self.cluster.work(node, piece)

    @rule(address=ADDRESSES, piece=PIECES)
    def stalls(self, address, piece):
        node = self.cluster.nodes[address]
        if node.fetching.get(piece, (UPSTREAM,))[0] != UPSTREAM:
            self.cluster.doubt(node, piece)

    @rule(address=ADDRESSES, piece=PIECES)
    def gives_up(self, address, piece):
        self.cluster.nodes[address].fetching.pop(piece, None)

    @rule(address=ADDRESSES, other=ADDRESSES, mask=MASKS.filter(bool))
    def slanders(self, address, other, mask):
        if address != other:
            self.cluster.nodes[address].failed[other] = mask

    @rule(address=ADDRESSES, piece=PIECES)
    def evicts(self, address, piece):
        self.cluster.nodes[address].held &= ~(1 << piece)

    @precondition(lambda self: sum(n.is_alive for n in self.cluster.nodes.values()) > 1)
    @rule(address=ADDRESSES)
    def dies(self, address):
        self.cluster.nodes[address] = Node(address, is_alive=False)

    @rule(address=ADDRESSES)
    def comes_back(self, address):
        if not self.cluster.nodes[address].is_alive:
            self.cluster.nodes[address] = Node(address)

    @rule(address=ADDRESSES)
    def leaves(self, address):
        self.coordinator.forget_member(address)
        for piece, lease in list(self.cluster.leases.items()):
            if lease[0] == address:
                del self.cluster.leases[piece]

    @rule(address=ADDRESSES, mask=MASKS)
    def is_heard_of(self, address, mask):
        self.coordinator.learn(KEY, address, mask, self.cluster.now)

    @rule(limit=st.integers(0, COUNT), wanted=MASKS)
    def asks_unreachable(self, limit, wanted):
        claim = Claim(KEY, wanted=wanted, lease_limit=limit)
        self.coordinator.answer("", claim, self.cluster.now)

    @rule()
    def forgets_everything(self):
        self.cluster.coordinator = Coordinator()
        self.cluster.leases.clear()

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.0, 5.0, 20.0, 700.0]))
    def time_passes(self, seconds):
        self.cluster.now += seconds

    @invariant()
    def books_balance(self):
        if hasattr(self, "cluster"):
            check_books(self.coordinator)
            live = self.coordinator.live_leases(self.cluster.now)
            assert 0 <= live <= COUNT
            assert self.coordinator.regions <= 1

    def teardown(self):
        if hasattr(self, "cluster"):
            self.cluster.finish()
            check_books(self.coordinator)


TestStorm = Storm.TestCase
# Twenty runs of a machine with so many rules would hardly meet two of them in a row.
TestStorm.settings = settings(max_examples=max(80, settings().max_examples))
