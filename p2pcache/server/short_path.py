"""The fast lane of the mirror, for the commonest request: one range of a blob that is held.

A lazily started container waits for dozens of such reads, one after the other. They are recognised
in the bytes as they come in. The answer is the same as the ordinary one, header for header.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from p2pcache.core.errors import RequestError
from p2pcache.core.model import Digest, Repository
from p2pcache.core.oci import OCTET_STREAM, ErrorCode, error_body
from p2pcache.metrics import Metrics
from p2pcache.ports import BlobStore
from p2pcache.server.lane import HEADERS, LaneConnection, LaneServer, unusual

logger = logging.getLogger(__name__)

_REQUEST = re.compile(
    rb"GET /v2/([a-z0-9._/-]{1,255})/blobs/(sha256:[0-9a-f]{64})"
    rb"(?:\?ns=([A-Za-z0-9.:-]{1,255}))?" + HEADERS
)
_NAMESPACE = re.compile(rb"\r\nOCI-Namespace: ([^\r]*)\r\n", re.IGNORECASE)
_UNUSUAL = unusual(
    rb"x-dragonfly-registry", rb"oci-namespace:[^\r]*\r\n(?:[^\r]+\r\n)*oci-namespace"
)

# 256 ranges of a large blob fit into one header; a longer one is answered with 400.
MAX_HEADER_BYTES: Final = 16 << 10
KEEP_ALIVE_S: Final = 600.0

_MAX_KNOWN: Final = 4096


class ShortPathServer(LaneServer):
    """A server of clients: the handler of the mirror, and the lane."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        store: BlobStore,
        metrics: Metrics,
        repository_of: Callable[[str | None, str, Digest], Repository | None],
    ) -> None:
        super().__init__(
            handler,
            store,
            _Connection,
            max_field_size=MAX_HEADER_BYTES,
            keepalive_timeout=KEEP_ALIVE_S,
        )
        self.count_bytes = metrics.served_bytes["local"].inc
        self.count_request = metrics.requests.labels("blob", "206").inc
        self._repository_of = repository_of
        self._namespaces: dict[tuple[bytes, bytes], bytes] = {}

    def head_of(self, digest: Digest) -> bytes:
        """Return the constant part of the answers from a blob, the status line first."""
        return (
            f"HTTP/1.1 206 Partial Content\r\n"
            f"Docker-Distribution-API-Version: registry/2.0\r\n"
            f"Server: p2pcache\r\n"
            f"Content-Type: {OCTET_STREAM}\r\n"
            f"Docker-Content-Digest: {digest}\r\n"
            f'ETag: "{digest}"\r\n'
        ).encode("ascii")

    def namespace(self, registry: bytes, name: bytes, digest: Digest) -> bytes | None:
        """Return the answer's header that names the registry; None if the request is not sound."""
        line = self._namespaces.get((registry, name))
        if line is not None:
            return line
        try:
            repository = self._repository_of(
                registry.decode("ascii") or None, name.decode("ascii"), digest
            )
        except RequestError:
            return None
        if repository is None:
            return b""
        line = f"OCI-Namespace: {repository.registry}\r\n".encode("ascii")
        if registry:  # else manifests have told, and may tell otherwise later
            if len(self._namespaces) >= _MAX_KNOWN:
                self._namespaces.clear()
            self._namespaces[registry, name] = line
        return line


class _Connection(LaneConnection):
    """One client."""

    __slots__ = ("_server",)

    def __init__(self, server: ShortPathServer, **kwargs: Any) -> None:  # noqa: ANN401 - aiohttp's
        super().__init__(server, **kwargs)
        self._server = server

    def answer(self, data: bytes) -> bool:
        """Answer a range of a held blob."""
        match = _REQUEST.fullmatch(data)
        if match is None or _UNUSUAL.search(data) is not None:
            return False
        name, digest, registry, first, last = match.groups()
        server = self._server
        known = server.look_up(digest)
        if known is None:
            return False
        if registry is None:
            named = _NAMESPACE.search(data)
            registry = named[1].strip() if named else b""
        namespace = server.namespace(registry, name, known.digest)
        if namespace is None:
            return False
        sent = self.send(known, first, last, namespace + b"Accept-Ranges: bytes\r\n")
        if not sent:
            return False
        server.count_bytes(sent)
        server.count_request()
        return True

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be parsed, or a bug: only the second is worth an error's line."""
        if status != 400:
            return super().handle_error(request, status, exc, message)
        logger.debug("request.malformed", extra={"reason": message})
        reason = (message or "malformed").partition("\n")[0][:200]
        response = web.Response(
            status=400,
            body=error_body(ErrorCode.UNSUPPORTED, f"not a request: {reason}"),
            content_type="application/json",
            headers={"Server": "p2pcache"},
        )
        response.force_close()
        return response
