"""Getting in: from a registry's challenge to the Authorization header that answers it.

Hides the distribution project's token service (spec: "Token Authentication", both the GET form
and the OAuth 2 form) and Basic authentication. The rules it keeps: credentials leave only over
https, unless the operator configured this very registry as plain http; a token is asked for once
however many wait for it; no more than to pull is ever asked for.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec
from yarl import URL

from p2pcache.core.challenge import Challenge, parse_challenges, pull_scope
from p2pcache.core.dockerconfig import Credentials, IdentityToken, Password, RegistryToken
from p2pcache.core.errors import (
    FormatError,
    SourceError,
    SourceRefused,
    SourceUnavailable,
)
from p2pcache.core.expiry import token_lifetime_s
from p2pcache.core.model import Repository
from p2pcache.upstream.bounded import BoundedMap
from p2pcache.upstream.credentials import CredentialStore
from p2pcache.upstream.endpoint import Endpoint
from p2pcache.upstream.transport import Deadline, Transport, retry_after_s

logger = logging.getLogger(__name__)

_MAX_ANSWER_BYTES: Final = 256 * 1024
_REMEMBERED: Final = 1024
_CLIENT_ID: Final = "p2pcache"
# RFC 6750, section 2.1, and a length that fits into a header.
_BEARER = re.compile(r"[A-Za-z0-9\-._~+/]{1,16384}=*", re.ASCII)


class _TokenAnswer(msgspec.Struct):
    """Token spec, "Token Response Fields"; the OAuth 2 form knows only ``access_token``."""

    token: str = ""
    access_token: str = ""
    expires_in: float | None = None


@dataclass(slots=True)
class _Slot:
    """The token of one repository and one set of credentials."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    token: str = field(default="", repr=False)
    until: float = 0.0
    failure: SourceError | None = None
    failed_at: float = float("-inf")


class Authenticator:
    """Knows, per repository, what the registry asked for and what answers it."""

    def __init__(self, transport: Transport, credentials: CredentialStore) -> None:
        self._transport = transport
        self._credentials = credentials
        # Per repository, not per registry: public ones often need no token where others do.
        self._challenges: BoundedMap[Repository, Challenge] = BoundedMap(_REMEMBERED)
        self._slots: BoundedMap[tuple[Repository, Credentials | None], _Slot] = BoundedMap(
            _REMEMBERED
        )

    async def header(
        self, endpoint: Endpoint, repository: Repository, deadline: Deadline
    ) -> str | None:
        """Return the Authorization to send; None as long as the registry has not asked for one.

        Raises `SourceRefused` if there are no credentials that would do, `SourceUnavailable` if
        the token service fails.
        """
        challenge = self._challenges.get(repository)
        if challenge is None:
            return None
        credentials = await self._credentials.find(repository)
        if challenge.scheme == "basic":
            if not isinstance(credentials, Password):
                raise SourceRefused(endpoint.source, "wants a password; none is configured")
            return _basic(credentials)
        if isinstance(credentials, RegistryToken):
            return f"Bearer {_checked(endpoint, credentials.token)}"
        slot = self._slots.get_or_make((repository, credentials), _Slot)
        return f"Bearer {await self._token(slot, endpoint, repository, credentials, deadline)}"

    async def answer(
        self,
        endpoint: Endpoint,
        repository: Repository,
        fields: Iterable[str],
        refused: str | None,
        deadline: Deadline,
    ) -> str:
        """Return the Authorization that answers a challenge: the WWW-Authenticate *fields*.

        *refused* is the Authorization that did not do, which is not used again.
        """
        try:
            challenges = parse_challenges(fields)
        except FormatError as error:
            raise SourceRefused(endpoint.source, f"unreadable challenge: {error}") from error
        self._challenges.put(repository, _choose(endpoint, challenges))
        if refused is not None:
            slot = self._slots.get((repository, await self._credentials.find(repository)))
            # Another request may have fetched a new token since this one was sent.
            if slot is not None and refused == f"Bearer {slot.token}":
                slot.until = 0.0
            self._credentials.forget(repository.registry)
        header = await self.header(endpoint, repository, deadline)
        assert header is not None, "there is a challenge"
        return header

    async def _token(
        self,
        slot: _Slot,
        endpoint: Endpoint,
        repository: Repository,
        credentials: Password | IdentityToken | None,
        deadline: Deadline,
    ) -> str:
        asked_at = time.monotonic()
        if asked_at < slot.until:
            return slot.token
        try:
            async with asyncio.timeout(max(0.0, deadline.left())):
                await slot.lock.acquire()
        except TimeoutError:
            raise SourceUnavailable(endpoint.source, "out of time, waiting for a token") from None
        try:
            if time.monotonic() < slot.until:
                return slot.token
            # Those who waited share the failure too, or they would fail one after the other.
            if slot.failure is not None and slot.failed_at >= asked_at:
                raise _again(slot.failure)
            try:
                slot.token, lasts_s = await self._fetch(endpoint, repository, credentials, deadline)
            except SourceError as error:
                slot.failure, slot.failed_at = error, time.monotonic()
                raise
            slot.until, slot.failure = time.monotonic() + lasts_s, None
            return slot.token
        finally:
            slot.lock.release()

    async def _fetch(
        self,
        endpoint: Endpoint,
        repository: Repository,
        credentials: Password | IdentityToken | None,
        deadline: Deadline,
    ) -> tuple[str, float]:
        """Ask the token service. Return the token and for how long to use it."""
        challenge = self._challenges.get(repository)
        assert challenge is not None, "a token is only fetched to answer a challenge"
        realm = _realm(endpoint, challenge)
        wanted = {"scope": pull_scope(repository.name, challenge)}
        if service := challenge.params.get("service"):
            wanted["service"] = service
        headers: dict[str, str] = {}
        form: Mapping[str, str] | None = None
        if isinstance(credentials, IdentityToken):
            form = {
                "grant_type": "refresh_token",
                "client_id": _CLIENT_ID,
                "refresh_token": credentials.token,
                **wanted,
            }
        else:
            realm = realm.extend_query({**wanted, "client_id": _CLIENT_ID})
            if isinstance(credentials, Password):
                realm = realm.extend_query({"account": credentials.username})
                headers["Authorization"] = _basic(credentials)
        response = await self._transport.send(
            "GET" if form is None else "POST",
            realm,
            source=endpoint.source,
            headers=headers,
            deadline=deadline,
            form=form,
        )
        try:
            if response.status == 429 or response.status >= 500:
                raise SourceUnavailable(
                    endpoint.source,
                    f"token service answered {response.status}",
                    retry_after_s=retry_after_s(response),
                )
            if response.status != 200:
                raise SourceRefused(endpoint.source, f"token service answered {response.status}")
            data = await self._transport.body(
                response, endpoint.source, deadline, _MAX_ANSWER_BYTES
            )
        finally:
            response.release()
        return _parse_token(endpoint, data)


def _choose(endpoint: Endpoint, challenges: Iterable[Challenge]) -> Challenge:
    """Pick the challenge to answer: a token before a password."""
    offered = {challenge.scheme: challenge for challenge in reversed(tuple(challenges))}
    if "realm" in offered.get("bearer", Challenge("")).params:
        return offered["bearer"]
    if "basic" in offered:
        return offered["basic"]
    raise SourceRefused(endpoint.source, "asks for authentication of a kind that is not known")


def _realm(endpoint: Endpoint, challenge: Challenge) -> URL:
    """Return the token service's URL. Raises `SourceRefused` if it is not safe to ask."""
    try:
        realm = URL(challenge.params["realm"])
        usable = realm.scheme in ("http", "https") and realm.host and realm.port
    except ValueError:
        usable = False
    if not usable or realm.user is not None or realm.password is not None:
        raise SourceRefused(endpoint.source, "token service is not at a web address")
    if realm.scheme == "http" and not endpoint.is_plain:
        raise SourceRefused(endpoint.source, "token service is at a plain http address")
    return realm


def _parse_token(endpoint: Endpoint, data: bytes) -> tuple[str, float]:
    try:
        # Not strict: some services write the seconds as text.
        answer = msgspec.json.decode(data, type=_TokenAnswer, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise SourceUnavailable(endpoint.source, "unreadable answer of token service") from None
    token = _checked(endpoint, answer.token or answer.access_token)
    return token, token_lifetime_s(answer.expires_in)


def _checked(endpoint: Endpoint, token: str) -> str:
    """Return *token* if it can stand in a header."""
    if _BEARER.fullmatch(token) is None:
        raise SourceRefused(endpoint.source, "no usable token")
    return token


def _basic(credentials: Password) -> str:
    """RFC 7617."""
    pair = f"{credentials.username}:{credentials.password}".encode()
    return "Basic " + base64.b64encode(pair).decode("ascii")


def _again(error: SourceError) -> SourceError:
    """Return the same error anew: one exception object must not be raised in many tasks."""
    if isinstance(error, SourceUnavailable):
        return SourceUnavailable(error.source, error.reason, retry_after_s=error.retry_after_s)
    return type(error)(error.source, error.reason)
