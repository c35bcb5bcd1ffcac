"""Every metric, in one place. Labels are bounded: never a digest, a peer or a repository."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from p2pcache import __version__

LATENCY_BUCKETS_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class Metrics:
    """The counters of one node, on a registry of their own, so that a process can hold several."""

    content_type: Final = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        r = self._registry
        Gauge("p2pcache_build_info", "The running version.", ["version"], registry=r).labels(
            __version__
        ).set(1)
        served = Counter(
            "p2pcache_served_bytes_total",
            "Bytes of blobs sent to clients, by where this request got them from.",
            ["source"],
            registry=r,
        )
        self.served_bytes = {s: served.labels(s) for s in ("local", "peer", "upstream")}
        fetched = Counter(
            "p2pcache_fetched_bytes_total",
            "Bytes of blobs and manifests read from other machines.",
            ["source"],
            registry=r,
        )
        self.fetched_bytes = {s: fetched.labels(s) for s in ("peer", "upstream")}
        self.peer_served_bytes = Counter(
            "p2pcache_peer_served_bytes_total", "Bytes of blobs sent to peers.", registry=r
        )
        self.peer_busy = Counter(
            "p2pcache_peer_busy_requests_total",
            "Requests of peers turned away because this node had too many at that moment.",
            registry=r,
        )
        self.requests = Counter(
            "p2pcache_mirror_requests_total",
            "Requests answered by the mirror, by kind and status.",
            ["kind", "status"],
            registry=r,
        )
        self.first_byte_s = Histogram(
            "p2pcache_first_byte_seconds",
            "Time from a request for a blob to its first byte, where not all of it was held.",
            registry=r,
            buckets=LATENCY_BUCKETS_S,
        )
        self.source_failures = Counter(
            "p2pcache_source_failures_total",
            "Reads from a source that failed and were tried elsewhere.",
            ["source", "reason"],
            registry=r,
        )
        self.peer_blames = Counter(
            "p2pcache_peer_blames_total", "Times a peer delivered wrong bytes.", registry=r
        )
        self.hedges = Counter(
            "p2pcache_hedged_reads_total",
            "Reads for which a second source was asked because the first made no progress.",
            registry=r,
        )
        self.unleased_pieces = Counter(
            "p2pcache_unleased_pieces_total",
            "Pieces read from the upstream without a lease: no coordinator could be reached, or "
            "nobody delivered them.",
            registry=r,
        )
        self.claim_failures = Counter(
            "p2pcache_claim_failures_total",
            "Messages to a coordinator that it did not answer.",
            registry=r,
        )
        self.answered_claims = Counter(
            "p2pcache_answered_claims_total",
            "Claims and announcements that this node answered as a coordinator.",
            registry=r,
        )
        self.leased_pieces = Counter(
            "p2pcache_leased_pieces_total",
            "Pieces that this node, as a coordinator, had somebody read from the upstream.",
            registry=r,
        )
        self.coordinated_regions = Gauge(
            "p2pcache_coordinated_regions",
            "Regions of which this node, as a coordinator, knows something.",
            registry=r,
        )
        paced = Counter(
            "p2pcache_paced_seconds_total",
            "Time that reads waited for a limit of this node, by the limit.",
            ["direction"],
            registry=r,
        )
        self.paced_s = {d: paced.labels(d) for d in ("upload", "upstream")}
        waiting = Gauge(
            "p2pcache_paced_requests",
            "Requests that wait for a limit of this node now.",
            ["direction"],
            registry=r,
        )
        self.paced_requests = {d: waiting.labels(d) for d in ("upload", "upstream")}
        self.rotten_pieces = Counter(
            "p2pcache_rotten_pieces_total",
            "Stored pieces that no longer matched their hash and were dropped.",
            registry=r,
        )
        self.stale_tags = Counter(
            "p2pcache_stale_tags_total",
            "Tags answered from memory because the upstream failed.",
            ["memory"],
            registry=r,
        )
        self.unstored_pieces = Counter(
            "p2pcache_unstored_pieces_total",
            "Pieces served without storing them: the disk or the budget is full.",
            registry=r,
        )
        self.layout_fallbacks = Counter(
            "p2pcache_layout_fallbacks_total",
            "Blobs whose table of contents could not be used.",
            registry=r,
        )
        self.store_bytes = Gauge("p2pcache_store_bytes", "Bytes in the store.", registry=r)
        self.store_budget_bytes = Gauge(
            "p2pcache_store_budget_bytes", "Bytes that the store may take.", registry=r
        )
        self.store_blobs = Gauge(
            "p2pcache_store_blobs", "Blobs of which the store holds something.", registry=r
        )
        self.content_bytes = Gauge(
            "p2pcache_content_bytes",
            "Bytes served from containerd's content store: proven, and not in the store.",
            registry=r,
        )
        self.content_blobs = Gauge(
            "p2pcache_content_blobs", "Blobs served from containerd's content store.", registry=r
        )

    def render(self) -> bytes:
        """The metrics page."""
        return generate_latest(self._registry)
