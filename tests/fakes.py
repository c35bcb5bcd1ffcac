"""A container registry for tests: real HTTP on loopback, everything that can go wrong on order.

    async with FakeRegistry(storage=True, auth=TokenAuth(private={"team/app"})) as registry:
        digest = registry.add_blob("team/app", b"...")
        registry.inject(Stall(after=100), path="*/blobs/*")
        ...
        assert registry.storage.bytes_sent == 4096

Three kinds of host, each an origin of its own with its own access list and faults: the registry
(`FakeRegistry`), the blob storage that it may redirect to (`FakeStorage`: signed addresses, and a
400 for whoever brings an Authorization) and the token service (`FakeTokenService`).

What is counted is what was handed to the connection. A fault is a value with one method; `inject`
says which request it happens to. Nothing here sleeps; only a `bytes_per_s` limit takes time.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import socket
import ssl
import struct
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self
from urllib.parse import parse_qs, quote

import trustme
from aiohttp import web
from multidict import CIMultiDict

from p2pcache.core.challenge import Challenge
from p2pcache.core.errors import BadRange, RangeNotSatisfiable
from p2pcache.core.model import Digest, Repository
from p2pcache.core.ranges import parse_range

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"

_BLOCK: Final = 64 * 1024
_NEVER: Final = 1 << 62
_PATH: Final = re.compile(
    r"/v2/(?P<name>.+)/(?:manifests/(?P<reference>[^/]+)|blobs/(?P<blob>[^/]+)"
    r"|referrers/(?P<subject>[^/]+)|(?P<tags>tags/list))"
)


# What was asked.


@dataclass(slots=True)
class Access:
    """One request: what was asked, and what was answered. Listed as soon as it arrives."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str] = field(repr=False)
    status: int = 0
    """0 until the headers went out."""
    bytes_sent: int = 0
    """Body bytes so far."""
    finished: bool = False
    """Answered to the end, or broken off."""

    @property
    def range(self) -> str | None:
        """The Range header."""
        return self.headers.get("Range")

    @property
    def authorization(self) -> str | None:
        """The Authorization header."""
        return self.headers.get("Authorization")


# What is answered, and what can be wrong with it.


@dataclass(slots=True)
class Reply:
    """An answer in the making. Faults change it; then it is sent."""

    status: int
    headers: CIMultiDict[str]
    body: bytes | memoryview = b""
    whole: bytes | None = None
    """The blob that *body* is a part of."""
    chunked: bool = False
    """Without a Content-Length."""
    announced: int | None = None
    """The Content-Length, if not that of *body*."""
    endless: bool = False
    """The body is sent again and again."""
    pause_at: int = _NEVER
    """Wait at this byte of the body for *resume*; before the headers if negative."""
    resume: asyncio.Event | None = None
    """None waits until the host closes or the client goes away."""
    end_at: int = _NEVER
    """Drop the connection at this byte of the body; before the headers if negative."""
    reset: bool = False
    """Drop it with a TCP reset, not a regular end."""


class Fault(Protocol):
    """Something that goes wrong with one answer."""

    def apply(self, reply: Reply) -> None:
        """Spoil the *reply*."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Another status, with these headers and this body."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def apply(self, reply: Reply) -> None:
        reply.status, reply.headers, reply.body = self.status, CIMultiDict(self.headers), self.body


@dataclass(frozen=True, slots=True)
class Redirect:
    """A redirect to *url*."""

    url: str
    status: int = 307
    headers: Mapping[str, str] = field(default_factory=dict)

    def apply(self, reply: Reply) -> None:
        Answer(self.status, {"Location": self.url, **self.headers}).apply(reply)


@dataclass(frozen=True, slots=True)
class IgnoreRange:
    """200 and the whole blob, as some registries answer a range request."""

    chunked: bool = False

    def apply(self, reply: Reply) -> None:
        if reply.whole is not None:
            reply.status, reply.body, reply.chunked = 200, reply.whole, self.chunked
            reply.headers.popall("Content-Range", None)


@dataclass(frozen=True, slots=True)
class Header:
    """One header with another value, such as a lying Content-Range; None removes it."""

    name: str
    value: str | None

    def apply(self, reply: Reply) -> None:
        reply.headers.popall(self.name, None)
        if self.value is not None:
            reply.headers[self.name] = self.value


@dataclass(frozen=True, slots=True)
class Narrow:
    """A correct 206, but of only the first *size* bytes asked for (RFC 9110 permits it)."""

    size: int

    def apply(self, reply: Reply) -> None:
        first, total = re.fullmatch(  # type: ignore[union-attr]  # a test that misuses it may fail
            r"bytes (\d+)-\d+/(\d+)", reply.headers["Content-Range"]
        ).groups()
        reply.body = memoryview(reply.body)[: self.size]
        last = int(first) + len(reply.body) - 1
        reply.headers["Content-Range"] = f"bytes {first}-{last}/{total}"


@dataclass(frozen=True, slots=True)
class Chunked:
    """The body without a Content-Length, and with *extra* bytes at its end."""

    extra: bytes = b""

    def apply(self, reply: Reply) -> None:
        reply.chunked, reply.body = True, bytes(reply.body) + self.extra


@dataclass(frozen=True, slots=True)
class Endless:
    """A body that never ends."""

    def apply(self, reply: Reply) -> None:
        reply.chunked = reply.endless = True
        # In blocks of some size, or the tests that read megabytes of it take seconds.
        body = bytes(reply.body) or b"endless"
        reply.body = body * (_BLOCK // len(body) + 1)


@dataclass(frozen=True, slots=True)
class FlipBit:
    """One wrong bit, in byte *at* of the body."""

    at: int = 0

    def apply(self, reply: Reply) -> None:
        body = bytearray(reply.body)
        body[self.at] ^= 1
        reply.body = bytes(body)


@dataclass(frozen=True, slots=True)
class Short:
    """A regular end of the connection after so many bytes, too early. Negative: no answer."""

    after: int

    def apply(self, reply: Reply) -> None:
        reply.end_at = self.after


@dataclass(frozen=True, slots=True)
class Reset:
    """A TCP reset after so many bytes. Negative: instead of an answer."""

    after: int

    def apply(self, reply: Reply) -> None:
        reply.end_at, reply.reset = self.after, True


@dataclass(frozen=True, slots=True)
class Stall:
    """Silence after so many bytes, with the connection left open. Negative: no answer."""

    after: int

    def apply(self, reply: Reply) -> None:
        reply.pause_at = self.after


@dataclass(frozen=True, slots=True)
class Hold:
    """No answer until *until* is set, or none of the body past byte *after* if that is given.

    With this a test decides the order of events, without sleeping.
    """

    until: asyncio.Event
    after: int = -1

    def apply(self, reply: Reply) -> None:
        reply.pause_at, reply.resume = self.after, self.until


@dataclass(frozen=True, slots=True)
class Together:
    """Several faults in one answer, in this order."""

    faults: tuple[Fault, ...]

    def apply(self, reply: Reply) -> None:
        for fault in self.faults:
            fault.apply(reply)


@dataclass(slots=True)
class Injection:
    """A fault and the requests that it happens to."""

    fault: Fault
    method: str
    path: str
    when: Callable[[Access], bool]
    left: int
    hits: int = 0

    def matches(self, access: Access) -> bool:
        """Say whether it happens to this request."""
        return (
            self.left > 0
            and fnmatchcase(access.method, self.method)
            and fnmatchcase(access.path, self.path)
            and self.when(access)
        )


# Hosts.


class TestAuthority:
    """A certificate authority of one's own: servers get certificates, clients its `ca_file`."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        self.ca_file = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca_file))

    def server_context(self) -> ssl.SSLContext:
        """The TLS context of a server on loopback."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
        return context


class FakeHost:
    """An HTTP server on loopback with an access list and faults. An async context manager."""

    def __init__(
        self, *, tls: TestAuthority | None = None, bytes_per_s: float | None = None
    ) -> None:
        self._tls = tls
        self.bytes_per_s = bytes_per_s
        """What all answers together may send. May be changed at any time."""
        self.log: list[Access] = []
        """Every request since the start, or since the last `clear_log`, in order of arrival."""
        self.address = ""
        """Host and port, as in an image name."""
        self.connections = 0
        """How many connections were accepted."""
        self._injections: list[Injection] = []
        self._free_at = 0.0
        self._stack = AsyncExitStack()
        self._seen: set[Any] = set()
        self._arrived = asyncio.Event()

    @property
    def url(self) -> str:
        """The base URL."""
        return f"{'https' if self._tls else 'http'}://{self.address}"

    async def __aenter__(self) -> Self:
        runner = web.ServerRunner(
            web.Server(self._handle, handler_cancellation=True, access_log=None),
            shutdown_timeout=0.0,
        )
        self._stack.push_async_callback(runner.cleanup)
        await runner.setup()
        context = self._tls.server_context() if self._tls else None
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        self.address = f"127.0.0.1:{runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def inject(
        self,
        fault: Fault,
        *,
        method: str = "*",
        path: str = "*",
        when: Callable[[Access], bool] = lambda _: True,
        times: int | None = 1,
    ) -> Injection:
        """Let *fault* happen to the next *times* requests that match (None: to all of them).

        *method* and *path* are glob patterns; the first injection that matches a request is the
        one that happens to it.
        """
        injection = Injection(fault, method, path, when, _NEVER if times is None else times)
        self._injections.append(injection)
        return injection

    def heal(self) -> None:
        """Take all faults back."""
        self._injections.clear()

    def clear_log(self) -> None:
        """Forget the requests so far."""
        self.log.clear()

    @property
    def bytes_sent(self) -> int:
        """Body bytes of all answers in the log."""
        return sum(access.bytes_sent for access in self.log)

    def requests(self, path: str = "*", method: str = "*") -> list[Access]:
        """The requests in the log that match the glob patterns."""
        return [
            access
            for access in self.log
            if fnmatchcase(access.path, path) and fnmatchcase(access.method, method)
        ]

    async def arrived(self, count: int, path: str = "*", method: str = "*") -> None:
        """Wait until *count* requests that match have arrived. Gives up after five seconds."""
        async with asyncio.timeout(5.0):
            while len(self.requests(path, method)) < count:
                self._arrived.clear()
                await self._arrived.wait()

    async def reply(self, request: web.BaseRequest) -> Reply:
        """Answer, if nothing goes wrong."""
        raise NotImplementedError

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        if transport not in self._seen:
            self._seen.add(transport)
            self.connections += 1
        # What the client sent, not what a URL library makes of it: signatures cover the spelling.
        path, _, query = request.raw_path.partition("?")
        access = Access(request.method, path, query, request.headers.copy())
        self.log.append(access)
        self._arrived.set()
        try:
            reply = await self.reply(request)
            for injection in self._injections:
                if injection.matches(access):
                    injection.left -= 1
                    injection.hits += 1
                    injection.fault.apply(reply)
                    break
            return await self._send(request, access, reply)
        except ConnectionResetError:
            return web.Response()  # the client has gone: nobody reads this
        finally:
            access.finished = True

    async def _send(
        self, request: web.BaseRequest, access: Access, reply: Reply
    ) -> web.StreamResponse:
        if reply.pause_at < 0:
            await self._pause(reply)
        if reply.end_at < 0:
            return _drop(request, reply)
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        if reply.chunked:
            response.enable_chunked_encoding()
        elif reply.status not in (204, 304):
            length = len(reply.body) if reply.announced is None else reply.announced
            response.content_length = length
        await response.prepare(request)
        access.status = reply.status
        if request.method == "HEAD":
            return response
        body, at, paused = memoryview(reply.body), 0, False
        while reply.endless or at < len(body):
            if at >= reply.pause_at and not paused:
                await self._pause(reply)
                paused = True
            if at >= reply.end_at:
                return _drop(request, reply)
            stop = min(at + self._block, reply.end_at, _NEVER if paused else reply.pause_at)
            start = at % len(body) if reply.endless else at
            block = body[start : start + stop - at]
            await self._throttle(len(block))
            await response.write(block)
            at += len(block)
            access.bytes_sent = at
        if at >= reply.pause_at and not paused:
            await self._pause(reply)
        if at >= reply.end_at:
            return _drop(request, reply)
        await response.write_eof()
        return response

    async def _pause(self, reply: Reply) -> None:
        # An event that nobody sets: the handler is cancelled when the client goes away.
        await (reply.resume or asyncio.Event()).wait()

    @property
    def _block(self) -> int:
        """How much is sent at once: a slow host drips."""
        return (
            _BLOCK if self.bytes_per_s is None else max(1, min(_BLOCK, int(self.bytes_per_s / 50)))
        )

    async def _throttle(self, size: int) -> None:
        if self.bytes_per_s is None:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(now, self._free_at) + size / self.bytes_per_s
        await asyncio.sleep(self._free_at - now)


def _drop(request: web.BaseRequest, reply: Reply) -> web.StreamResponse:
    """End the connection in the middle of an answer."""
    transport = request.transport
    if transport is not None:
        if reply.reset:
            # Linger for no time: what is unsent is thrown away, and the client sees a reset.
            connection: socket.socket = transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        else:
            transport.close()
    raise ConnectionResetError


# Authentication.


@dataclass(frozen=True, slots=True)
class BasicAuth:
    """The registry itself wants one of these users for everything."""

    users: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TokenAuth:
    """The registry wants a token from a token service.

    Anyone gets one for what is not *private*; for the rest it takes one of *users*, or one of the
    *identity_tokens*, by POST.
    """

    users: Mapping[str, str] = field(default_factory=dict)
    identity_tokens: Collection[str] = ()
    private: Collection[str] = ()
    expires_in: object = 300
    """As it stands in the answer; None leaves it out."""
    named_scope: Callable[[str], str] = lambda name: name
    """The name of a repository in the challenge's scope."""


class FakeTokenService(FakeHost):
    """Grants tokens as the distribution spec's token authentication describes."""

    def __init__(self, auth: TokenAuth, *, tls: TestAuthority | None = None) -> None:
        super().__init__(tls=tls)
        self.auth = auth
        self.granted: dict[str, str] = {}
        """The repository that each valid token is for."""
        self.scopes: list[str] = []
        """The scopes that were asked for, in order."""
        self._count = 0

    def revoke(self) -> None:
        """No token is valid any more."""
        self.granted.clear()

    async def reply(self, request: web.BaseRequest) -> Reply:
        """Grant a token."""
        refused = Reply(401, CIMultiDict(), b'{"details":"incorrect username or password"}')
        if request.method == "POST":
            form = {key: values[0] for key, values in parse_qs(await request.text()).items()}
            known = form.get("refresh_token", "") in self.auth.identity_tokens
            if form.get("grant_type") != "refresh_token" or not known:
                return refused
            scope, trusted, name = form["scope"], True, "access_token"
        else:
            authorization = request.headers.get("Authorization")
            trusted = authorization is not None
            if authorization is not None and not _knows(self.auth.users, authorization):
                return refused
            scope, name = request.query["scope"], "token"
        self.scopes.append(scope)
        repository = scope.split(":")[1]
        self._count += 1
        token = f"granted-{self._count}-{hashlib.sha256(scope.encode()).hexdigest()[:16]}"
        if trusted or repository not in self.auth.private:
            self.granted[token] = repository
        body: dict[str, object] = {name: token}
        if self.auth.expires_in is not None:
            body["expires_in"] = self.auth.expires_in
        return Reply(
            200, CIMultiDict({"Content-Type": "application/json"}), json.dumps(body).encode()
        )


def _knows(users: Mapping[str, str], authorization: str) -> bool:
    scheme, _, encoded = authorization.partition(" ")
    if scheme != "Basic":
        return False
    username, _, password = base64.b64decode(encoded).decode().partition(":")
    return users.get(username) == password


# Storage and registry.


class FakeStorage(FakeHost):
    """Blob storage behind a registry: signed addresses that lapse, no other authentication."""

    def __init__(
        self,
        blobs: Mapping[Digest, bytes],
        *,
        tls: TestAuthority | None = None,
        bytes_per_s: float | None = None,
    ) -> None:
        super().__init__(tls=tls, bytes_per_s=bytes_per_s)
        self._blobs = blobs
        self._signatures: set[str] = set()
        self._count = 0
        self.lifetime_s = 600
        """What the addresses say, from now on."""

    def sign(self, digest: Digest) -> str:
        """Return a new address for a blob, in the manner of Amazon's signature version 4."""
        self._count += 1
        # A slash, a plus and an equals sign: characters that URL libraries like to spell anew.
        signature = quote(f"sig/{self._count}+secret=", safe="")
        self._signatures.add(signature)
        date = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        return (
            f"{self.url}/data/{digest.encoded}?X-Amz-Date={date}"
            f"&X-Amz-Expires={self.lifetime_s}&X-Amz-Signature={signature}"
        )

    def revoke(self) -> None:
        """No address that was given out works any more."""
        self._signatures.clear()

    async def reply(self, request: web.BaseRequest) -> Reply:
        """Serve a blob to whoever has its address and nothing else."""
        if "Authorization" in request.headers:
            return Reply(400, CIMultiDict(), b"only one authentication mechanism is allowed")
        signature = request.raw_path.rpartition("X-Amz-Signature=")[2]
        if signature not in self._signatures or request.method != "GET":
            return Reply(403, CIMultiDict(), b"SignatureDoesNotMatch")
        data = self._blobs.get(Digest("sha256", request.path.rpartition("/")[2]))
        if data is None:
            return Reply(404, CIMultiDict(), b"NoSuchKey")
        return _blob_reply(request, data)


class FakeRegistry(FakeHost):
    """The pull side of the OCI distribution API, filled by `add_blob` and `add_manifest`.

    With *storage* blobs are redirected to `self.storage`; with a `TokenAuth` there is a token
    service, `self.tokens`. Both start and stop with the registry.
    """

    storage: FakeStorage
    tokens: FakeTokenService

    def __init__(
        self,
        *,
        auth: BasicAuth | TokenAuth | None = None,
        storage: bool = False,
        tls: TestAuthority | None = None,
        bytes_per_s: float | None = None,
    ) -> None:
        super().__init__(tls=tls, bytes_per_s=bytes_per_s)
        self._auth = auth
        self._blobs: dict[Digest, bytes] = {}
        self._repositories: dict[str, set[Digest]] = {}
        self._manifests: dict[tuple[str, Digest], tuple[str, bytes]] = {}
        self._tags: dict[str, dict[str, Digest]] = {}
        self._redirects = storage
        self.names_digests = True
        """Send Docker-Content-Digest."""
        # A slow line is slow wherever the bytes come from: the storage has the limit of its own.
        self.storage = FakeStorage(self._blobs, tls=tls, bytes_per_s=bytes_per_s)
        self.tokens = FakeTokenService(
            auth if isinstance(auth, TokenAuth) else TokenAuth(), tls=tls
        )

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        if self._redirects:
            await self._stack.enter_async_context(self.storage)
        if isinstance(self._auth, TokenAuth):
            await self._stack.enter_async_context(self.tokens)
        return self

    def repository(self, name: str) -> Repository:
        """The repository *name* of this registry, under the address that it listens on."""
        return Repository.parse(self.address, name)

    def add_blob(self, name: str, data: bytes) -> Digest:
        """Store a blob in the repository *name*."""
        digest = Digest.of(data)
        self._blobs[digest] = data
        self._repositories.setdefault(name, set()).add(digest)
        return digest

    def remove_blob(self, name: str, digest: Digest) -> None:
        """Take a blob out of a repository."""
        self._repositories[name].discard(digest)

    def add_manifest(self, name: str, media_type: str, data: bytes, *tags: str) -> Digest:
        """Store a manifest, and let *tags* point at it."""
        digest = Digest.of(data)
        self._manifests[name, digest] = (media_type, data)
        self._tags.setdefault(name, {}).update(dict.fromkeys(tags, digest))
        return digest

    def add_image(
        self,
        name: str,
        tag: str,
        layers: Collection[bytes],
        annotations: Collection[Mapping[str, str]] = (),
        media_type: str = OCI_LAYER,
    ) -> Digest:
        """Store an image of these *layers*, with *annotations* for each if given."""
        config = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {}}).encode()
        body = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self._descriptor(name, OCI_CONFIG, config, {}),
            "layers": [
                self._descriptor(name, media_type, layer, notes)
                for layer, notes in zip(layers, annotations or [{} for _ in layers], strict=True)
            ],
        }
        return self.add_manifest(name, OCI_MANIFEST, json.dumps(body).encode(), tag)

    def _descriptor(
        self, name: str, media_type: str, data: bytes, annotations: Mapping[str, str]
    ) -> dict[str, object]:
        digest = self.add_blob(name, data)
        found = {"mediaType": media_type, "digest": str(digest), "size": len(data)}
        return {**found, "annotations": dict(annotations)} if annotations else found

    async def reply(self, request: web.BaseRequest) -> Reply:
        """Answer as the distribution spec says."""
        if request.method not in ("GET", "HEAD"):
            return _error(405, "UNSUPPORTED")
        if request.path == "/v2/":
            return Reply(200, CIMultiDict({"Content-Type": "application/json"}), b"{}")
        match = _PATH.fullmatch(request.path)
        if match is None:
            return _error(404, "NOT_FOUND")
        name = match["name"]
        if (challenge := self._challenge(request, name)) is not None:
            reply = _error(401, "UNAUTHORIZED")
            reply.headers["WWW-Authenticate"] = challenge
            return reply
        if match["reference"]:
            return self._manifest(name, match["reference"])
        if match["blob"]:
            return self._blob(request, name, match["blob"])
        if match["subject"]:
            return self._referrers(name, match["subject"])
        return self._tag_list(request, name)

    def _challenge(self, request: web.BaseRequest, name: str) -> str | None:
        """Return what to ask of a request that does not prove enough."""
        authorization = request.headers.get("Authorization", "")
        if isinstance(self._auth, BasicAuth):
            if not _knows(self._auth.users, authorization):
                return str(Challenge("Basic", {"realm": "fake"}))
        elif isinstance(self._auth, TokenAuth):
            named = self._auth.named_scope(name)
            if self.tokens.granted.get(authorization.removeprefix("Bearer ")) != named:
                return str(
                    Challenge(
                        "Bearer",
                        {
                            "realm": f"{self.tokens.url}/token",
                            "service": "fake",
                            "scope": f"repository:{named}:pull",
                        },
                    )
                )
        return None

    def _manifest(self, name: str, reference: str) -> Reply:
        digest = self._tags.get(name, {}).get(reference)
        if ":" in reference:
            digest = Digest.parse(reference)
        found = self._manifests.get((name, digest)) if digest is not None else None
        if found is None:
            return _error(404, "MANIFEST_UNKNOWN")
        headers = CIMultiDict({"Content-Type": found[0]})
        if self.names_digests:
            headers["Docker-Content-Digest"] = str(digest)
        return Reply(200, headers, found[1])

    def _blob(self, request: web.BaseRequest, name: str, text: str) -> Reply:
        digest = Digest.parse(text)
        if digest not in self._repositories.get(name, ()):
            return _error(404, "BLOB_UNKNOWN")
        if self._redirects:
            return Reply(307, CIMultiDict({"Location": self.storage.sign(digest)}), b"")
        reply = _blob_reply(request, self._blobs[digest])
        if self.names_digests:
            reply.headers["Docker-Content-Digest"] = text
        return reply

    def _referrers(self, name: str, subject: str) -> Reply:
        found = [
            {"mediaType": media_type, "digest": str(digest), "size": len(data)}
            for (owner, digest), (media_type, data) in self._manifests.items()
            if owner == name and json.loads(data).get("subject", {}).get("digest") == subject
        ]
        body = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found}
        return Reply(200, CIMultiDict({"Content-Type": OCI_INDEX}), json.dumps(body).encode())

    def _tag_list(self, request: web.BaseRequest, name: str) -> Reply:
        if name not in self._tags:
            return _error(404, "NAME_UNKNOWN")
        tags = sorted(tag for tag in self._tags[name] if tag > request.query.get("last", ""))
        limit = int(request.query.get("n", len(tags)))
        headers = CIMultiDict({"Content-Type": "application/json"})
        if limit < len(tags):
            link = f"/v2/{name}/tags/list?n={limit}&last={tags[limit - 1]}"
            headers["Link"] = f'<{link}>; rel="next"'
        return Reply(200, headers, json.dumps({"name": name, "tags": tags[:limit]}).encode())


def _blob_reply(request: web.BaseRequest, data: bytes) -> Reply:
    """Serve a blob or a range of it; of several ranges, as many registries do, the whole."""
    headers = CIMultiDict({"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"})
    try:
        asked = parse_range(request.headers.get("Range", ""), len(data))
    except BadRange:
        return _error(400, "RANGE_INVALID")
    except RangeNotSatisfiable as error:
        reply = _error(416, "RANGE_INVALID")
        reply.headers["Content-Range"] = f"bytes */{error.size}"
        return reply
    if asked is None or len(asked.parts) > 1:
        return Reply(200, headers, data, whole=data)
    part = asked.parts[0]
    headers["Content-Range"] = part.content_range(len(data))
    return Reply(206, headers, memoryview(data)[part.start : part.stop], whole=data)


def _error(status: int, code: str) -> Reply:
    """An error body as in the distribution spec, "Error Codes"."""
    body = {"errors": [{"code": code, "message": code.lower().replace("_", " ")}]}
    return Reply(
        status, CIMultiDict({"Content-Type": "application/json"}), json.dumps(body).encode()
    )
