"""One question to a registry, up to the answer that counts.

Hides the places in the queue, the challenge, the redirects and the memory of where they led. The
rule it keeps: Authorization goes to the registry's own scheme, host and port and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from aiohttp import ClientResponse
from yarl import URL

from p2pcache.core.errors import ConfigError, SourceRefused, SourceUnavailable
from p2pcache.core.model import Digest, Repository
from p2pcache.core.pacing import Priority
from p2pcache.upstream.auth import Authenticator
from p2pcache.upstream.bounded import BoundedMap
from p2pcache.upstream.endpoint import Endpoint, UpstreamConfig
from p2pcache.upstream.redirects import RedirectMemory, lifetime_s, resolve_target
from p2pcache.upstream.transport import Deadline, HostResting, Transport, wall_clock

logger = logging.getLogger(__name__)

REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})

_MAX_HOPS: Final = 5
# The part of a registry's connections that may be taken by what no client waits for.
_LESSER: Final = 0.75
_REGISTRIES: Final = 256
# From an address that was good before, these mean that it no longer is.
_LAPSED: Final = frozenset({400, 401, 403, 404, 410})


@dataclass(frozen=True, slots=True)
class Question:
    """One request as the registry should see it; *path* stands below ``/v2/NAME/``."""

    repository: Repository
    path: str
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Sequence[tuple[str, str]] = ()
    blob: Digest | None = None
    """If given, the address that answers is remembered for this blob."""
    priority: Priority = Priority.DEMAND
    follow: bool = True
    """Otherwise a redirect is an answer."""


@dataclass(frozen=True, slots=True)
class _Registry:
    """A registry and the limit on requests to it: *free* to run, *queue* to run or wait.

    What nobody waits for runs with a place in *lesser* as well, so that slow reads in the
    background never hold all connections.
    """

    endpoint: Endpoint
    free: asyncio.Semaphore
    lesser: asyncio.Semaphore
    queue: asyncio.Semaphore


class Dialogue:
    """Asks questions of registries. *on_request* is told of every answer's status."""

    def __init__(
        self,
        config: UpstreamConfig,
        transport: Transport,
        auth: Authenticator,
        on_request: Callable[[str, int], None] | None,
    ) -> None:
        self._config = config
        self._transport = transport
        self._auth = auth
        self._on_request = on_request
        self._redirects = RedirectMemory()
        self._registries: BoundedMap[str, _Registry] = BoundedMap(_REGISTRIES)

    def endpoint(self, registry: str) -> Endpoint:
        """Return where *registry* is. Raises `SourceRefused` if it cannot be anywhere."""
        return self._registry(registry).endpoint

    @asynccontextmanager
    async def answer(self, question: Question, deadline: Deadline) -> AsyncIterator[ClientResponse]:
        """Ask, follow redirects, and hold the answer open, of whatever status.

        Raises `SourceUnavailable`, or `SourceRefused` if the way is barred before there is one.
        """
        registry = self._registry(question.repository.registry)
        async with _slot(registry, question.priority, deadline):
            response = await self._ask_remembered(question, registry.endpoint, deadline)
            if response is None:
                response = await self._ask_registry(question, registry.endpoint, deadline)
            try:
                yield response
            finally:
                # Closes the connection unless the body has been read to its end.
                response.release()

    async def _ask_remembered(
        self, question: Question, endpoint: Endpoint, deadline: Deadline
    ) -> ClientResponse | None:
        """Ask the address that answered last time; None if there is none, or it has lapsed."""
        if question.blob is None:
            return None
        target = self._redirects.find(question.repository, question.blob, time.monotonic())
        if target is None:
            return None
        try:
            response = await self._send(question, endpoint, target, None, deadline)
        except HostResting:
            raise  # the registry would only send us there again
        except SourceUnavailable as error:
            logger.debug("upstream.lapsed", extra={"source": error.source, "error": error.reason})
        else:
            if response.status not in _LAPSED and response.status not in REDIRECTS:
                return response
            await self._transport.discard(response)
        self._redirects.forget(question.repository, question.blob, target)
        return None

    async def _ask_registry(
        self, question: Question, endpoint: Endpoint, deadline: Deadline
    ) -> ClientResponse:
        url = endpoint.url(f"{question.repository.name}/{question.path}")
        url = url.with_query(list(question.query)) if question.query else url
        response = await self._send_with_auth(question, endpoint, url, deadline)
        lasts_s, hops = float("inf"), 0
        while response.status in REDIRECTS and question.follow:
            location, headers = response.headers.get("Location"), response.headers
            await self._transport.discard(response)
            hops += 1
            if hops > _MAX_HOPS:
                raise SourceRefused(endpoint.source, f"more than {_MAX_HOPS} redirects")
            url = resolve_target(endpoint, url, location)
            lasts_s = min(lasts_s, lifetime_s(url, headers, wall_clock()))
            if endpoint.owns(url):
                response = await self._send_with_auth(question, endpoint, url, deadline)
            else:
                response = await self._send(question, endpoint, url, None, deadline)
        if question.blob is not None and not endpoint.owns(url):
            self._remember(question.repository, question.blob, url, lasts_s, response)
        return response

    def _remember(
        self,
        repository: Repository,
        blob: Digest,
        url: URL,
        lasts_s: float,
        response: ClientResponse,
    ) -> None:
        if lasts_s > 0 and response.status in (200, 206):
            until = time.monotonic() + lasts_s
            self._redirects.put(repository, blob, url, until=until)

    async def _send_with_auth(
        self, question: Question, endpoint: Endpoint, url: URL, deadline: Deadline
    ) -> ClientResponse:
        """Ask the registry itself; answer its challenge, once."""
        assert endpoint.owns(url), "Authorization goes to the registry only"
        repository = question.repository
        header = await self._auth.header(endpoint, repository, deadline)
        response = await self._send(question, endpoint, url, header, deadline)
        fields = response.headers.getall("WWW-Authenticate", [])
        narrow = response.status == 403 and any("insufficient_scope" in text for text in fields)
        if fields and (response.status == 401 or (narrow and header is not None)):
            await self._transport.discard(response)
            header = await self._auth.answer(endpoint, repository, fields, header, deadline)
            response = await self._send(question, endpoint, url, header, deadline)
        return response

    async def _send(
        self,
        question: Question,
        endpoint: Endpoint,
        url: URL,
        authorization: str | None,
        deadline: Deadline,
    ) -> ClientResponse:
        headers = dict(question.headers)
        if authorization is not None:
            headers["Authorization"] = authorization
        response = await self._transport.send(
            question.method, url, source=endpoint.source, headers=headers, deadline=deadline
        )
        if self._on_request is not None:
            self._on_request(endpoint.registry, response.status)
        return response

    def _registry(self, registry: str) -> _Registry:
        def make() -> _Registry:
            try:
                endpoint = Endpoint.of(registry, self._config.endpoints.get(registry))
            except ConfigError as error:
                raise SourceRefused(f"upstream {registry}", "not a host") from error
            running = self._config.connections_per_registry
            waiting = self._config.waiting_per_registry
            return _Registry(
                endpoint,
                free=asyncio.Semaphore(running),
                lesser=asyncio.Semaphore(max(1, int(running * _LESSER))),
                queue=asyncio.Semaphore(running + waiting),
            )

        return self._registries.get_or_make(registry, make)


@asynccontextmanager
async def _slot(registry: _Registry, priority: Priority, deadline: Deadline) -> AsyncIterator[None]:
    """Hold one of the registry's places for a request. Raises `SourceUnavailable`."""
    source = registry.endpoint.source
    if registry.queue.locked():
        raise SourceUnavailable(source, "too many requests are waiting")
    async with registry.queue, AsyncExitStack() as places:
        try:
            async with asyncio.timeout(max(0.0, deadline.left())):
                if priority is not Priority.DEMAND:
                    await places.enter_async_context(registry.lesser)
                await places.enter_async_context(registry.free)
        except TimeoutError:
            raise SourceUnavailable(source, "out of time, waiting for a connection") from None
        yield
