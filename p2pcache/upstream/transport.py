"""One HTTP request to one host: connections, TLS, time limits, and what can go wrong.

Hides aiohttp. The rules it keeps: certificates are always checked; no wait is without a bound;
every failure leaves as a `SourceError`, whose text never holds a path's query, where signatures
stand, nor a header. That is also why errors are raised ``from None`` here: the messages of the
HTTP library quote whole URLs.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import aiohttp
from yarl import URL

from p2pcache import __version__
from p2pcache.core.errors import ConfigError, IntegrityError, SourceUnavailable
from p2pcache.core.expiry import parse_retry_after
from p2pcache.upstream.backoff import Gate
from p2pcache.upstream.bounded import BoundedMap
from p2pcache.upstream.endpoint import Patience, origin

logger = logging.getLogger(__name__)

READ_AHEAD: Final = 256 * 1024
"""A connection holds up to twice so many bytes that nobody has read yet; then it is paused."""
# Signed URLs in Location, and tokens, can pass the 8 KiB that aiohttp allows by default.
_FIELD: Final = 32 * 1024
_HOSTS: Final = 512
# The body of a redirect or an error is read, to keep the connection, up to these limits.
_DRAIN_BYTES: Final = 16 * 1024
_DRAIN_S: Final = 1.0
_KEEP_ALIVE_S: Final = 60.0


class HostResting(SourceUnavailable):
    """The host asked for quiet, or keeps failing: it was not asked at all."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in monotonic time."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """*seconds* from now."""
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds until then; not positive once it has passed."""
        return self.at - time.monotonic()

    def later(self, seconds: float) -> Deadline:
        """The point *seconds* after this one."""
        return Deadline(self.at + seconds)


class Transport:
    """Sends requests and reads bodies. Owns the connections: an async context manager."""

    def __init__(
        self, patience: Patience, ca_file: Path | None, *, read_ahead: int = READ_AHEAD
    ) -> None:
        self._patience = patience
        self._read_ahead = read_ahead
        self._ca_file = ca_file
        self._gates: BoundedMap[tuple[str, str, int], Gate] = BoundedMap(_HOSTS)
        self._stack = AsyncExitStack()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        context = await asyncio.to_thread(_trust, self._ca_file)
        # The number of connections is bounded by the client, per registry.
        connector = aiohttp.TCPConnector(
            limit=0, ssl=context, keepalive_timeout=_KEEP_ALIVE_S, ttl_dns_cache=30
        )
        self._session = await self._stack.enter_async_context(
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                read_bufsize=self._read_ahead,
                max_line_size=_FIELD,
                max_field_size=_FIELD,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._patience.connect_s),
                headers={
                    "User-Agent": f"p2pcache/{__version__}",
                    "Accept-Encoding": "identity",
                },
            )
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()
        self._session = None

    async def send(
        self,
        method: str,
        url: URL,
        *,
        source: str,
        headers: Mapping[str, str],
        deadline: Deadline,
        form: Mapping[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        """Return the answer, its body unread, of whatever status. Redirects are not followed.

        The caller must `release` it. Raises `SourceUnavailable`; `HostResting` without asking.
        """
        assert self._session is not None, "the transport is not open"
        gate = self._gates.get_or_make(origin(url), Gate)
        if (wait := gate.enter(time.monotonic())) > 0:
            raise HostResting(source, "resting after failures", retry_after_s=wait)
        patience = self._patience.connect_s + self._patience.headers_s
        left = deadline.left()
        if left <= 0:
            raise SourceUnavailable(source, "out of time")
        try:
            async with asyncio.timeout(min(patience, left)):
                response = await self._session.request(
                    method, url, headers=headers, data=form, allow_redirects=False
                )
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # TimeoutError is an OSError. Running out of the caller's time is not the host's fault.
            if patience <= left or not isinstance(error, TimeoutError):
                self._failed(gate, url, source)
            raise SourceUnavailable(source, f"{url.host}: {_reason(error)}") from None
        self._note(gate, url, source, response)
        return response

    async def block(
        self,
        response: aiohttp.ClientResponse,
        source: str,
        deadline: Deadline,
        *,
        most: int | None = None,
    ) -> bytes:
        """Return the next bytes of the body, *most* or fewer, as they come; none at its end.

        Raises `SourceUnavailable` if it stalls or breaks off.
        """
        left = deadline.left()
        if left <= 0:
            raise SourceUnavailable(source, "too slow")
        try:
            async with asyncio.timeout(min(self._patience.progress_s, left)):
                if most is None:
                    return await response.content.readany()
                return await response.content.read(most)
        except (aiohttp.ClientError, OSError) as error:
            raise SourceUnavailable(source, f"body: {_reason(error)}") from None

    async def body(
        self,
        response: aiohttp.ClientResponse,
        source: str,
        deadline: Deadline,
        limit: int,
        *,
        pay: Callable[[int], Awaitable[None]] | None = None,
    ) -> bytes:
        """Return the whole body. Raises `SourceUnavailable`; `IntegrityError` above *limit*.

        *pay* is awaited after each block, before the next is read.
        """
        announced = response.content_length
        data = bytearray()
        if announced is None or announced <= limit:
            while block := await self.block(response, source, deadline):
                data += block
                if len(data) > limit:
                    break
                if pay is not None:
                    await pay(len(block))
            else:
                return bytes(data)
        raise IntegrityError(source, f"answer of more than {limit} bytes")

    async def discard(self, response: aiohttp.ClientResponse) -> None:
        """Be done with an answer whose body does not matter; keep the connection if cheap."""
        try:
            announced = response.content_length
            if announced is None or announced <= _DRAIN_BYTES:
                async with asyncio.timeout(_DRAIN_S):
                    await response.content.readexactly(_DRAIN_BYTES)
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError):
            logger.debug("upstream.drained", extra={"status": response.status})
        finally:
            response.release()

    def _note(self, gate: Gate, url: URL, source: str, response: aiohttp.ClientResponse) -> None:
        wait = retry_after_s(response) if response.status in (429, 503) else None
        if wait is not None:
            gate.quiet(time.monotonic(), wait)
        elif response.status == 429 or response.status >= 500:
            self._failed(gate, url, source)
        else:
            gate.succeeded()

    def _failed(self, gate: Gate, url: URL, source: str) -> None:
        if gate.failed(time.monotonic()):
            logger.warning("upstream.resting", extra={"source": source, "host": url.host})


def retry_after_s(response: aiohttp.ClientResponse) -> float | None:
    """Return for how long the answer asks not to be asked again."""
    return parse_retry_after(response.headers.get("Retry-After", ""), wall_clock())


def wall_clock() -> float:
    """Seconds since the epoch: only for dates that others wrote."""
    return datetime.now(UTC).timestamp()


def _trust(ca_file: Path | None) -> ssl.SSLContext:
    """Trust the system's certificates and those of *ca_file*. Raises `ConfigError`."""
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError([f"certificates for upstreams: {ca_file}: {error}"]) from error
    return context


def _reason(error: Exception) -> str:
    """Say what went wrong without quoting the request."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"certificate: {error.certificate_error}"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {error.os_error.strerror or type(error.os_error).__name__}"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError):
        return "connection closed"
    return type(error).__name__
