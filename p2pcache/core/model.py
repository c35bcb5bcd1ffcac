"""The words of the registry world as values: digests, references, descriptors.

A value that exists is a valid one: ``parse`` refuses everything else, so nothing checks again.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from p2pcache.core.errors import BadDigest, BadName

# image-spec, descriptor.md: registered algorithms, lower-case hex.
_HEX_LENGTH: Final = MappingProxyType({"sha256": 64, "sha512": 128})
_DIGEST = re.compile(r"(sha256|sha512):([0-9a-f]{64,128})", re.ASCII)
# Far above any layer: 52 GB is the most that Amazon's registry takes. The pieces of a blob take
# memory in proportion to its size, so a size that someone merely states is bounded.
MAX_BLOB_SIZE: Final = 128 << 30
# distribution-spec, "Pulling manifests": <name> and <reference>.
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", re.ASCII)
# A host name, an IPv4 address or a bracketed IPv6 address, with an optional port.
_REGISTRY = re.compile(
    r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]{0,252}[a-zA-Z0-9])?|\[[0-9a-fA-F:.]{2,45}\])(?::[0-9]{1,5})?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """The name of immutable bytes: ``sha256:…``."""

    algorithm: str
    encoded: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Return the digest that *text* spells. Raises `BadDigest`."""
        match = _DIGEST.fullmatch(text)
        if match is None or len(match[2]) != _HEX_LENGTH[match[1]]:
            raise BadDigest(text)
        return cls(match[1], match[2])

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Digest:
        """Return the sha256 digest of *data*."""
        return cls("sha256", hashlib.sha256(data).hexdigest())

    def matches(self, data: bytes | bytearray | memoryview) -> bool:
        """Say whether *data* is what this digest names."""
        return hmac.compare_digest(hashlib.new(self.algorithm, data).hexdigest(), self.encoded)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.encoded}"

    @property
    def short(self) -> str:
        """The first twelve digits, for DEBUG logs."""
        return self.encoded[:12]


@dataclass(frozen=True, slots=True, order=True)
class Repository:
    """A repository within a registry: ``docker.io`` and ``library/alpine``."""

    registry: str
    name: str

    @classmethod
    def parse(cls, registry: str, name: str) -> Repository:
        """Return the repository. Raises `BadName`."""
        if len(name) > 255 or _REPOSITORY.fullmatch(name) is None:
            raise BadName("repository name", name)
        return cls(parse_registry(registry), name)

    def __str__(self) -> str:
        return f"{self.registry}/{self.name}"


@dataclass(frozen=True, slots=True, order=True)
class Tag:
    """A movable name for a manifest within a repository."""

    name: str

    @classmethod
    def parse(cls, text: str) -> Tag:
        """Return the tag. Raises `BadName`."""
        if _TAG.fullmatch(text) is None:
            raise BadName("tag", text)
        return cls(text)

    def __str__(self) -> str:
        return self.name


Reference = Digest | Tag


def parse_registry(text: str) -> str:
    """Return *text*, a registry host with an optional port, in lower case. Raises `BadName`."""
    if _REGISTRY.fullmatch(text) is None:
        raise BadName("registry host", text)
    return text.lower()


def parse_reference(text: str) -> Reference:
    """Return what *text* refers to: a digest if it holds a colon, else a tag."""
    return Digest.parse(text) if ":" in text else Tag.parse(text)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a manifest says of a blob, or an index of a manifest."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"not a size: {self.size}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest or an index as the registry spelled it: its digest covers exactly *data*."""

    digest: Digest
    media_type: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class TagFact:
    """What a tag meant when it was last asked for: *seen_at* is in seconds since the epoch."""

    digest: Digest
    media_type: str
    size: int
    seen_at: float


@dataclass(frozen=True, slots=True)
class BlobFacts:
    """What manifests say of a blob: enough to find and to prove it when only its digest is asked.

    *toc_digest* is known for lazily pullable layers. *repositories* are where the upstream serves
    it, newest first.
    """

    size: int
    media_type: str
    toc_digest: Digest | None = None
    repositories: tuple[Repository, ...] = ()
