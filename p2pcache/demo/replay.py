"""What containerd and the stargz snapshotter ask for when a container starts, played once.

Hides the request pattern (the order, the 50,000-byte blocks, the headers) and the client's own
block cache. The rule it keeps: it takes nothing from p2pcache's parsers of the image format, and
counts a file as a match only if its bytes hash to what the original file hashed to.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import zlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import aiohttp

from p2pcache.core.errors import FormatError, P2PCacheError
from p2pcache.core.model import Digest
from p2pcache.core.ranges import ByteRange, parse_content_range

# stargz-snapshotter, fs/config: chunk_size. Not a power of two.
BLOCK_SIZE: Final = 50_000
# fs/layer: an on-demand read peeks at most this far into a file's compressed bytes.
MAX_PEEK: Final = 2 << 20
# estargz/gzip.go: the footer ends the blob and spells the offset of the TOC in 16 hex digits.
FOOTER_SIZE: Final = 51
_FOOTER = re.compile(rb"\x1f\x8b\x08\x04.{6}\x1a\x00SG\x16\x00([0-9a-f]{16})STARGZ.{13}", re.DOTALL)
TOC_NAME: Final = "stargz.index.json"
TOC_DIGEST: Final = "containerd.io/snapshot/stargz/toc.digest"
LANDMARK: Final = ".prefetch.landmark"
MANIFEST_TYPES: Final = (
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "*/*",
)
_CONTAINERD: Final = "containerd/1.7.24"
_SNAPSHOTTER: Final = "Go-http-client/1.1"
_MAX_TOC: Final = 64 << 20
# The snapshotter gives one request, its body included, this long.
_REQUEST_S: Final = 30.0


class ReplayError(P2PCacheError):
    """The container could not start: a request failed, or what came back cannot be an image."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of one file: *size* bytes that the member at *start* inflates to."""

    start: int
    stop: int
    size: int


@dataclass(frozen=True, slots=True)
class Toc:
    """What the snapshotter keeps of a table of contents."""

    files: Mapping[str, tuple[Chunk, ...]]
    """The chunks of each regular file that is not empty."""
    landmark: int | None
    """Where the prefetched part ends."""


@dataclass(frozen=True, slots=True)
class StartUp:
    """What the container reads: *files* in order, with the sha256 that each must have."""

    repository: str
    tag: str
    files: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Outcome:
    """What one start came to."""

    requests: int = 0
    requested_bytes: int = 0
    """Body bytes received, without the framing of multipart answers."""
    files: int = 0
    mismatches: list[str] = field(default_factory=list)
    """Files whose bytes were not those of the original."""


@dataclass(slots=True)
class Blocks:
    """The client's block cache for one layer of *size* bytes."""

    size: int
    _blocks: dict[int, bytes] = field(default_factory=dict)

    def missing(self, wanted: ByteRange) -> tuple[ByteRange, ...]:
        """The block-aligned ranges to ask for before `read` can give *wanted*."""
        merged: list[ByteRange] = []
        last = (wanted.stop - 1) // BLOCK_SIZE
        for block in range(wanted.start // BLOCK_SIZE, last + 1):
            if block in self._blocks:
                continue
            start, stop = block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, self.size)
            if merged and merged[-1].stop == start:
                merged[-1] = ByteRange(merged[-1].start, stop)
            else:
                merged.append(ByteRange(start, stop))
        return tuple(merged)

    def write(self, part: ByteRange, data: bytes) -> None:
        """Keep the blocks of the block-aligned *part*."""
        for start in range(part.start, part.stop, BLOCK_SIZE):
            offset = start - part.start
            self._blocks[start // BLOCK_SIZE] = data[offset : offset + BLOCK_SIZE]

    def read(self, wanted: ByteRange) -> bytes:
        """The *wanted* bytes, all of whose blocks must be there."""
        first = wanted.start // BLOCK_SIZE
        last = (wanted.stop - 1) // BLOCK_SIZE
        data = b"".join(self._blocks[block] for block in range(first, last + 1))
        return data[wanted.start - first * BLOCK_SIZE : wanted.stop - first * BLOCK_SIZE]


def find_toc(footer: bytes) -> int:
    """Return where the footer says that the TOC starts. Raises `FormatError`."""
    match = _FOOTER.fullmatch(footer)
    if match is None:
        raise FormatError("the layer does not end in an eStargz footer")
    return int(match[1], 16)


def parse_toc(member: bytes, size: int, expected: str) -> Toc:
    """Read the TOC of a layer of *size* bytes, which must have the *expected* digest.

    Raises `FormatError`. Chunks end where the next member starts (estargz.go, ``initFields``).
    """
    try:
        document = _untar(inflate(member, _MAX_TOC))
        if str(Digest.of(document)) != expected:
            raise FormatError("the TOC is not the one that the manifest names")
        return _read_entries(json.loads(document)["entries"], size)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise FormatError(f"not a TOC: {error!r}") from error
    except RecursionError as error:
        raise FormatError("not a TOC: nested too deeply") from error


def _untar(archive: bytes) -> bytes:
    """Return the content of the archive's first file (POSIX ustar: name, then size in octal)."""
    if archive[:100].rstrip(b"\0") != TOC_NAME.encode():
        raise ValueError("it does not start with the TOC's header")
    size = int(archive[124:136].strip(b"\0 "), 8)
    return archive[512 : 512 + size]


def _read_entries(entries: Sequence[Mapping[str, Any]], size: int) -> Toc:
    # A digest-checked TOC is the image builder's word; the checks here only keep typos from turning
    # into endless reads.
    members = [e for e in entries if e["type"] in {"reg", "chunk"} and e.get("offset", 0)]
    starts = sorted({int(e["offset"]) for e in members})
    if starts and not 0 < starts[0] <= starts[-1] < size:
        raise ValueError("a member lies outside the layer")
    stops = dict(pairwise([*starts, size]))
    sizes = {str(e["name"]): int(e.get("size", 0)) for e in entries if e["type"] == "reg"}
    files: dict[str, list[Chunk]] = {}
    landmark = None
    for e in members:
        name, start = str(e["name"]), int(e["offset"])
        if name == LANDMARK:
            landmark = start
            continue
        length = int(e.get("chunkSize", 0)) or sizes[name] - int(e.get("chunkOffset", 0))
        if length <= 0:
            raise ValueError(f"an empty chunk in {name!r}")
        files.setdefault(name, []).append(Chunk(start, stops[start], length))
    return Toc({name: tuple(chunks) for name, chunks in files.items()}, landmark)


def split_multipart(content_type: str, body: bytes) -> list[tuple[ByteRange, bytes]]:
    """Return the parts of a ``multipart/byteranges`` body (RFC 9110, 14.6). Raises `FormatError`.

    Each part's length is taken from its Content-Range, so its bytes may hold the boundary.
    """
    match = re.search(r'boundary="?([^";\s]{1,70})"?', content_type)
    if match is None:
        raise FormatError("multipart without a boundary")
    delimiter = b"--" + match[1].encode("latin-1", "replace")
    parts: list[tuple[ByteRange, bytes]] = []
    at = body.find(delimiter)
    while at >= 0 and not body.startswith(delimiter + b"--", at):
        head_end = body.find(b"\r\n\r\n", at)
        if head_end < 0:
            break
        fields = body[at:head_end].decode("latin-1").split("\r\n")[1:]
        headers = {name.lower(): value for name, _, value in (f.partition(":") for f in fields)}
        part, _size = parse_content_range(headers.get("content-range", ""))
        start = head_end + 4
        data = body[start : start + len(part)]
        if len(data) != len(part) or not body.startswith(b"\r\n" + delimiter, start + len(part)):
            raise FormatError("a part is not as long as its Content-Range")
        parts.append((part, data))
        at = start + len(part) + 2
    if at < 0 or not body.startswith(delimiter + b"--", at):
        raise FormatError("multipart without an end")
    return parts


def inflate(data: bytes, size: int) -> bytes:
    """Return the first *size* bytes that *data* inflates to, fewer if it stops before.

    One chunk may lie in several members, and headers follow it: never insist on one.
    """
    pieces: list[bytes] = []
    while data and size > 0:
        member = zlib.decompressobj(wbits=31)
        try:
            piece = member.decompress(data, size)
        except zlib.error as error:
            raise FormatError(f"not gzip: {error}") from error
        pieces.append(piece)
        size -= len(piece)
        if not member.eof:
            break
        data = member.unused_data
    return b"".join(pieces)


@dataclass(slots=True)
class _Layer:
    url: str
    digest: str
    toc_digest: str
    blocks: Blocks = field(default_factory=lambda: Blocks(0))
    toc: Toc = field(default_factory=lambda: Toc({}, None))


@dataclass(slots=True)
class Replay:
    """One node's client. *mirror* is a base URL; *namespace* is None if it is the registry itself.

    Everything that `run` receives is kept for as long as the object lives.
    """

    session: aiohttp.ClientSession
    mirror: str
    namespace: str | None
    start_up: StartUp
    outcome: Outcome = field(default_factory=Outcome)

    async def run(self) -> Outcome:
        """Start the container. Raises `ReplayError`, as the container's start would fail."""
        try:
            layers = await self._pull()
            for name, expected in self.start_up.files:
                await self._open(layers, name, expected)
        except (aiohttp.ClientError, TimeoutError, FormatError) as error:
            reason = str(error) or type(error).__name__
            raise ReplayError(f"{self.mirror}: {reason}") from error
        return self.outcome

    async def _pull(self) -> list[_Layer]:
        """What ``ctr-remote images rpull`` does: containerd's reads, then the layers' mounts."""
        digest = await self._resolve_tag()
        base = f"{self.mirror}/v2/{self.start_up.repository}"
        manifest = await self._fetch_document(f"{base}/manifests/{digest}", digest)
        try:
            document = json.loads(manifest)
            config = str(document["config"]["digest"])
            layers = [
                _Layer(
                    f"{base}/blobs/{entry['digest']}",
                    str(entry["digest"]),
                    str(entry["annotations"][TOC_DIGEST]),
                )
                for entry in document["layers"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"not a manifest of a lazy image: {error!r}") from error
        await self._fetch_document(f"{base}/blobs/{config}", config)
        try:
            async with asyncio.TaskGroup() as group:
                for layer in layers:
                    group.create_task(self._mount(layer))
        except ExceptionGroup as group_error:
            # One failed layer fails the mount; the others' troubles add nothing.
            raise group_error.exceptions[0] from group_error
        return layers

    async def _resolve_tag(self) -> str:
        url = f"{self.mirror}/v2/{self.start_up.repository}/manifests/{self.start_up.tag}"
        headers = {"Accept": ", ".join(MANIFEST_TYPES), "User-Agent": _CONTAINERD}
        async with self._ask("HEAD", url, headers, names_registry=True) as response:
            digest = response.headers.get("Docker-Content-Digest", "")
        if not digest:
            raise FormatError("HEAD of the tag does not say its digest")
        return digest

    async def _fetch_document(self, url: str, digest: str) -> bytes:
        headers = {"Accept": ", ".join(MANIFEST_TYPES), "User-Agent": _CONTAINERD}
        async with self._ask("GET", url, headers, names_registry=True) as response:
            body = await response.read()
        self.outcome.requested_bytes += len(body)
        if not Digest.parse(digest).matches(body):
            raise FormatError(f"the body is not {digest}")
        return body

    async def _mount(self, layer: _Layer) -> None:
        """Probe, size, footer, TOC, then everything up to the landmark."""
        await self._get(layer, (ByteRange(0, 2),), probe=True)
        layer.blocks = Blocks(await self._ask_size(layer))
        size = layer.blocks.size
        if size < FOOTER_SIZE:
            raise FormatError("the layer is too short for a footer")
        footer = await self._read(layer, ByteRange(size - FOOTER_SIZE, size))
        start = find_toc(footer)
        if not start < size - FOOTER_SIZE:
            raise FormatError("the footer points past the end")
        member = await self._read(layer, ByteRange(start, size - FOOTER_SIZE))
        layer.toc = parse_toc(member, size, layer.toc_digest)
        if layer.toc.landmark:
            await self._read(layer, ByteRange(0, layer.toc.landmark))

    async def _ask_size(self, layer: _Layer) -> int:
        async with self._ask("HEAD", layer.url, {"User-Agent": _SNAPSHOTTER}) as response:
            length = response.headers.get("Content-Length", "")
        # Without an exact length the snapshotter refuses the host.
        if not length.isascii() or not length.isdigit():
            raise FormatError("HEAD of the layer does not say its size")
        return int(length)

    async def _open(self, layers: Iterable[_Layer], name: str, expected: str) -> None:
        """Read one file through the block cache and compare it."""
        layer = next((layer for layer in layers if name in layer.toc.files), None)
        if layer is None:
            raise FormatError(f"no layer has {name!r}")
        content = hashlib.sha256()
        for chunk in layer.toc.files[name]:
            content.update(await self._read_chunk(layer, chunk))
        self.outcome.files += 1
        if content.hexdigest() != expected:
            self.outcome.mismatches.append(name)

    async def _read_chunk(self, layer: _Layer, chunk: Chunk) -> bytes:
        stop = chunk.start
        data = b""
        while len(data) < chunk.size and stop < chunk.stop:
            stop = min(stop + MAX_PEEK, chunk.stop)
            compressed = await self._read(layer, ByteRange(chunk.start, stop))
            try:
                data = inflate(compressed, chunk.size)
            except FormatError:
                return b""  # wrong bytes: the comparison says so
        return data

    async def _read(self, layer: _Layer, wanted: ByteRange) -> bytes:
        missing = layer.blocks.missing(wanted)
        if missing:
            await self._get(layer, missing)
        return layer.blocks.read(wanted)

    async def _get(self, layer: _Layer, parts: Sequence[ByteRange], *, probe: bool = False) -> None:
        """Read *parts* of the layer in one request, as the snapshotter does, into its blocks."""
        spec = ",".join(f"{part.start}-{part.stop - 1}" for part in parts)
        headers = {"Range": f"bytes={spec}", "User-Agent": _SNAPSHOTTER}
        if not probe:
            headers["Accept-Encoding"] = "identity"
        async with self._ask("GET", layer.url, headers, expect=206) as response:
            body = await response.read()
        content_type = response.headers.get("Content-Type", "")
        if content_type.startswith("multipart/"):
            got = split_multipart(content_type, body)
        else:
            part, _size = parse_content_range(response.headers.get("Content-Range", ""))
            got = [(part, body)]
        if [part for part, _ in got] != list(parts) or any(len(p) != len(d) for p, d in got):
            raise FormatError(f"asked {layer.digest} for {spec}, got {[str(p) for p, _ in got]}")
        self.outcome.requested_bytes += sum(map(len, parts))
        if not probe:
            for part, data in got:
                layer.blocks.write(part, data)

    @asynccontextmanager
    async def _ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        expect: int = 200,
        names_registry: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """containerd says which registry it means in the query, the snapshotter in a header."""
        sent = dict(headers)
        query = {}
        if self.namespace is not None:
            if names_registry:
                query["ns"] = self.namespace
            else:
                sent["OCI-Namespace"] = self.namespace
        self.outcome.requests += 1
        async with self.session.request(method, url, params=query, headers=sent) as response:
            if response.status != expect:
                body = (await response.content.read(300)).decode("utf-8", "replace")
                raise FormatError(f"{method} {response.url.path}: {response.status} {body}")
            yield response


def open_session() -> aiohttp.ClientSession:
    """A session with the manners of Go's client: no compression, no patience beyond 30 s."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=_REQUEST_S, sock_connect=3),
        skip_auto_headers=("Accept-Encoding", "Accept"),
        auto_decompress=False,
    )
