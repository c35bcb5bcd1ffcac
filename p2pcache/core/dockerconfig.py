"""Docker's config.json: which credentials belong to which repository.

Hides the ways in which a registry is spelled as a key, and where docker keeps the secret: in the
file, or with a ``docker-credential-…`` program. The rule it keeps: credentials go to the registry
they were written down for, the most exact key first, and never show in a repr.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final, TypeVar

import msgspec

from p2pcache.core.errors import FormatError
from p2pcache.core.model import Repository

_T = TypeVar("_T")

MAX_CONFIG_BYTES: Final = 1 << 20
MAX_HELPER_BYTES: Final = 256 * 1024

# Docker Hub goes by three names, and docker writes a fourth spelling into the file.
DOCKER_HUB: Final = "docker.io"
_HUB_NAMES: Final = frozenset({DOCKER_HUB, "index.docker.io", "registry-1.docker.io"})
_HUB_KEY: Final = "https://index.docker.io/v1/"

# Part of a program's name that is looked up in PATH: no slash, so no other program can be meant.
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_KEY = re.compile(r"(?:https?://)?([^/\s]{1,255})((?:/[^\s]*)?)", re.ASCII | re.IGNORECASE)
# A helper answers with this name when the secret is an identity token.
_TOKEN_USER: Final = "<token>"


@dataclass(frozen=True, slots=True)
class Password:
    """A user name and a password, for Basic authentication at a registry or token service."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class IdentityToken:
    """A refresh token, which a token service trades for an access token (OAuth 2)."""

    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class RegistryToken:
    """A bearer token that the registry takes as it is."""

    token: str = field(repr=False)


Credentials = Password | IdentityToken | RegistryToken


@dataclass(frozen=True, slots=True)
class _Key:
    """What a key of ``auths`` or ``credHelpers`` covers: hosts, and repositories below *path*."""

    host: str
    path: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> _Key | None:
        """Return what *text* covers, or None if no registry can be meant."""
        match = _KEY.fullmatch(text.strip())
        if match is None:
            return None
        path = tuple(filter(None, match[2].split("/")))
        # The path of an API version is part of the old spelling, not of a repository's name.
        return cls(_canonical(match[1].lower()), () if path in (("v1",), ("v2",)) else path)

    def covers(self, registry: str, name: str = "") -> bool:
        """Match whole labels of the host and whole components of the path.

        ``*`` in a label stands for any text, as Kubernetes reads keys of image pull secrets.
        """
        labels, wanted = self.host.split("."), _canonical(registry).split(".")
        return (
            len(labels) == len(wanted)
            and all(map(_label_matches, wanted, labels))
            and tuple(name.split("/"))[: len(self.path)] == self.path
        )

    @property
    def rank(self) -> tuple[bool, int]:
        """The smaller, the more exact."""
        return ("*" in self.host, -len(self.path))


@dataclass(frozen=True, slots=True)
class DockerConfig:
    """What a config.json says about credentials."""

    auths: tuple[tuple[_Key, Credentials], ...] = ()
    helpers: tuple[tuple[_Key, str], ...] = ()
    store: str = ""

    def credentials(self, repository: Repository) -> Credentials | None:
        """Return the credentials that the file itself holds for *repository*."""
        found = [
            pair for pair in self.auths if pair[0].covers(repository.registry, repository.name)
        ]
        return _most_exact(found)

    def helper(self, registry: str) -> str | None:
        """Return the name of the program to ask first: X in ``docker-credential-X``."""
        found = [pair for pair in self.helpers if pair[0].covers(registry)]
        return _most_exact(found) or self.store or None


def server_address(registry: str) -> str:
    """Return the name under which docker's credential helpers know *registry*."""
    return _HUB_KEY if registry in _HUB_NAMES else registry


def parse_docker_config(data: bytes) -> DockerConfig:
    """Return what a config.json says. Raises `FormatError`, which quotes nothing of the file."""
    if len(data) > MAX_CONFIG_BYTES:
        raise FormatError(f"docker configuration of more than {MAX_CONFIG_BYTES} bytes")
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"not a docker configuration: {type(error).__name__}") from None
    auths = [
        (key, credentials)
        for text, entry in file.auths.items()
        if (key := _Key.parse(text)) and (credentials := _parse_entry(entry))
    ]
    for helper in (*file.cred_helpers.values(), file.creds_store):
        if helper and _HELPER.fullmatch(helper) is None:
            raise FormatError("not the name of a credential helper")
    helpers = [
        (key, helper)
        for text, helper in file.cred_helpers.items()
        if helper and (key := _Key.parse(text))
    ]
    return DockerConfig(tuple(auths), tuple(helpers), file.creds_store)


def parse_helper_answer(data: bytes) -> Credentials | None:
    """Return what ``docker-credential-X get`` printed; None if the secret is empty.

    Raises `FormatError`, which quotes nothing of the answer.
    """
    if len(data) > MAX_HELPER_BYTES:
        raise FormatError(f"credential helper's answer of more than {MAX_HELPER_BYTES} bytes")
    try:
        answer = msgspec.json.decode(data, type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"not a credential helper's answer: {type(error).__name__}") from None
    if not answer.secret:
        return None
    if answer.username == _TOKEN_USER:
        return IdentityToken(answer.secret)
    return Password(answer.username, answer.secret)


class _Entry(msgspec.Struct):
    """One of ``auths``. Other fields, such as an e-mail address, mean nothing here."""

    auth: str | None = None
    username: str | None = None
    password: str | None = None
    identitytoken: str | None = None
    registrytoken: str | None = None


class _File(msgspec.Struct):
    auths: dict[str, _Entry] = {}
    cred_helpers: dict[str, str] = msgspec.field(name="credHelpers", default_factory=dict)
    creds_store: str = msgspec.field(name="credsStore", default="")


class _Answer(msgspec.Struct):
    username: str = msgspec.field(name="Username", default="")
    secret: str = msgspec.field(name="Secret", default="")


def _parse_entry(entry: _Entry) -> Credentials | None:
    """Return the entry's credentials: tokens outrank passwords, as they do for docker."""
    if entry.registrytoken:
        return RegistryToken(entry.registrytoken)
    if entry.identitytoken:
        return IdentityToken(entry.identitytoken)
    if entry.auth:
        return _parse_auth(entry.auth)
    if entry.username and entry.password:
        return Password(entry.username, entry.password)
    return None


def _parse_auth(text: str) -> Password:
    """Read base64 of ``username:password``, padded with NULs by old versions of docker."""
    try:
        plain = base64.b64decode(text.strip(), validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        raise FormatError("an auth of the docker configuration is not base64 of text") from None
    username, colon, password = plain.partition(":")
    if not colon or not username:
        raise FormatError("an auth of the docker configuration is not a name and a password")
    return Password(username, password.strip("\x00"))


def _most_exact(found: Iterable[tuple[_Key, _T]]) -> _T | None:
    best = min(found, key=lambda pair: pair[0].rank, default=None)
    return None if best is None else best[1]


def _label_matches(name: str, label: str) -> bool:
    # Of the patterns that fnmatch knows, only the star: brackets enclose IPv6 addresses.
    return name == label or ("*" in label and fnmatchcase(name, label.replace("[", "[[]")))


def _canonical(host: str) -> str:
    return DOCKER_HUB if host in _HUB_NAMES else host
