"""Another node for tests: the peer API with everything that can go wrong on order.

    async with FakePeer() as peer:
        peer.hold(digest, data, layout)
        peer.inject(FlipBit(at=70_000), path=BLOB_BYTES)

It claims what `hold` says and gives the bytes that `hold` was given, whether they are right or not.
It coordinates nothing and greets nobody, as a node of an earlier version.
The faults are those of `tests.fakes`; two more here are lies that only a peer can tell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from multidict import CIMultiDict

from p2pcache.core.credential import REPLY_HEADER, REQUEST_HEADER, prove_reply
from p2pcache.core.errors import FormatError
from p2pcache.core.layout import Layout, LayoutKind, PieceMask
from p2pcache.core.model import Digest, Manifest
from p2pcache.core.oci import OCTET_STREAM
from p2pcache.core.ranges import parse_range
from p2pcache.core.toc import read_tail
from p2pcache.core.wire import MEDIA_TYPE, Holding, TagNews, encode_holding, encode_tag
from tests.fakes import FakeHost, Reply

BLOB_BYTES: Final = "/p2p/v1/blobs/sha256:" + 64 * "?"
"""A glob pattern for requests of a blob's bytes."""
HOLDING: Final = "*/holding"
MANIFEST: Final = "*/manifests/*"
TAIL: Final = "*/tail"


@dataclass(frozen=True, slots=True)
class Body:
    """Other bytes than those asked for, under the same headers."""

    data: bytes

    def apply(self, reply: Reply) -> None:
        reply.body = self.data


@dataclass(frozen=True, slots=True)
class OtherBytes:
    """As many bytes as were asked for, of another blob."""

    def apply(self, reply: Reply) -> None:
        reply.body = bytes(byte ^ 0x5A for byte in reply.body)


class FakePeer(FakeHost):
    """One other node on loopback. *secret* is what it proves its answers with, if anything."""

    def __init__(self, name: str = "fake", *, secret: bytes | None = None) -> None:
        super().__init__()
        self.name = name
        self._secret = secret
        self._holdings: dict[Digest, bytes] = {}
        self._blobs: dict[Digest, bytes] = {}
        self._tails: dict[Digest, tuple[Digest, bytes]] = {}
        self._manifests: dict[Digest, Manifest] = {}
        self.tag: TagNews | None = None
        """What it answers for any tag."""

    def hold(
        self,
        digest: Digest,
        data: bytes,
        layout: Layout,
        *,
        pieces: Iterable[int] | None = None,
        whole: bool = False,
    ) -> None:
        """Claim these *pieces* of a blob (all if None), and give bytes of *data* for it."""
        held = PieceMask.full(layout.count)
        if pieces is not None:
            held = PieceMask.of(layout.count, pieces)
        toc_offset = layout.starts[-1] if layout.kind is LayoutKind.TOC else None
        toc_digest = None if toc_offset is None else _toc_digest(data, layout)
        holding = Holding(self.name, layout.size, layout.kind, toc_offset, held, whole, toc_digest)
        self._holdings[digest] = encode_holding(holding)
        self._blobs[digest] = data
        if toc_digest and toc_offset in [layout.starts[piece] for piece in held]:
            self._tails[digest] = toc_digest, data[toc_offset:]

    def keep_manifest(self, digest: Digest, media_type: str, data: bytes) -> None:
        """Give *data* as the manifest *digest*."""
        self._manifests[digest] = Manifest(digest, media_type, data)
        layout = Layout.fixed(max(1, len(data)))
        everything = PieceMask.full(layout.count)
        holding = Holding(self.name, layout.size, layout.kind, None, everything, is_whole=True)
        self._holdings.setdefault(digest, encode_holding(holding))

    async def reply(self, request: web.BaseRequest) -> Reply:
        """Answer as a node would."""
        match request.path.removeprefix("/p2p/v1/").split("/"):
            case ["blobs", digest, "holding"] if Digest.parse(digest) in self._holdings:
                return self._signed(request, self._holdings[Digest.parse(digest)])
            case ["blobs", digest, "tail"] if Digest.parse(digest) in self._tails:
                toc_digest, tail = self._tails[Digest.parse(digest)]
                if request.query["toc"] != str(toc_digest):
                    return Reply(404, CIMultiDict(), b"not held")
                return Reply(200, CIMultiDict({"Content-Type": OCTET_STREAM}), tail)
            case ["blobs", digest] if Digest.parse(digest) in self._blobs:
                return _part(request, self._blobs[Digest.parse(digest)])
            case ["manifests", digest] if Digest.parse(digest) in self._manifests:
                manifest = self._manifests[Digest.parse(digest)]
                return Reply(200, CIMultiDict({"Content-Type": manifest.media_type}), manifest.data)
            case ["tags"] if self.tag is not None:
                return self._signed(request, encode_tag(self.tag))
            case _:
                return Reply(404, CIMultiDict(), b"not held")

    def _signed(self, request: web.BaseRequest, body: bytes) -> Reply:
        headers = CIMultiDict({"Content-Type": MEDIA_TYPE})
        if self._secret is not None:
            proof = request.headers.get(REQUEST_HEADER, "")
            headers[REPLY_HEADER] = prove_reply(self._secret, proof, body)
        return Reply(200, headers, body)


def _toc_digest(data: bytes, layout: Layout) -> Digest | None:
    """The digest of the table of contents at the end of *data*, if there is one."""
    try:
        _, document = read_tail(data[layout.starts[-1] :], len(data))
    except FormatError:
        return None
    return Digest.of(document)


def _part(request: web.BaseRequest, data: bytes) -> Reply:
    requested = parse_range(request.headers["Range"], len(data))
    assert requested is not None
    (part,) = requested.parts
    headers = CIMultiDict(
        {"Content-Type": OCTET_STREAM, "Content-Range": part.content_range(len(data))}
    )
    return Reply(206, headers, memoryview(data)[part.start : part.stop], whole=data)
