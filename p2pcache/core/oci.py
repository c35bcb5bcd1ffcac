"""The OCI distribution API as values: paths, manifests, error bodies.

OCI distribution-spec 1.1 ("Endpoints", "Error Codes") and image-spec 1.1 (manifest and index).
Docker's schema 2 documents have the same shape and are read by the same code; schema 1 is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

import msgspec

from p2pcache.core.errors import BadDigest, FormatError
from p2pcache.core.model import MAX_BLOB_SIZE, Descriptor, Digest, Reference, parse_reference

OCTET_STREAM: Final = "application/octet-stream"

MANIFEST_TYPES: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)

# The annotations that name a layer's table of contents: eStargz and stargz's zstd:chunked.
_TOC_DIGEST: Final = "containerd.io/snapshot/stargz/toc.digest"

# Deeper than any registry's path; parsing costs no more than the length.
_MAX_PATH: Final = 1024

MAX_MANIFEST_SIZE: Final = 16 << 20
"""Bytes. Registries accept 4 MiB (distribution-spec, "Pushing manifests"); this is a bound."""


class Resource(Enum):
    """What a path under ``/v2/`` names."""

    BASE = "base"
    MANIFEST = "manifest"
    BLOB = "blob"
    REFERRERS = "referrers"
    TAGS = "tags"


@dataclass(frozen=True, slots=True)
class Route:
    """A parsed path. *name* is the repository's, without its registry."""

    resource: Resource
    name: str = ""
    reference: Reference | None = None


def parse_path(path: str) -> Route | None:
    """Return what *path*, without its query, names; None if it is not of this API.

    Raises `BadDigest` or `BadName` if it is, but its last part is malformed.
    """
    if path in ("/v2/", "/v2"):
        return Route(Resource.BASE)
    if not path.startswith("/v2/") or len(path) > _MAX_PATH:
        return None
    # A repository may itself be called "a/blobs/b": the last such word counts.
    head, _, last = path[4:].rpartition("/")
    name, _, word = head.rpartition("/")
    if not name or not last:
        return None
    if word == "blobs":
        return Route(Resource.BLOB, name, Digest.parse(last))
    if word == "manifests":
        return Route(Resource.MANIFEST, name, parse_reference(last))
    if word == "referrers":
        return Route(Resource.REFERRERS, name, Digest.parse(last))
    if word == "tags" and last == "list":
        return Route(Resource.TAGS, name)
    return None


class _WireDescriptor(msgspec.Struct, rename="camel"):
    digest: str
    size: int
    media_type: str = ""
    annotations: dict[str, str] | None = None


class _WireManifest(msgspec.Struct, rename="camel"):
    schema_version: int
    media_type: str = ""
    config: _WireDescriptor | None = None
    # Go writes an empty list as null.
    layers: list[_WireDescriptor] | None = None
    manifests: list[_WireDescriptor] | None = None


@dataclass(frozen=True, slots=True)
class ManifestContent:
    """What a manifest or an index points at."""

    media_type: str
    blobs: tuple[Descriptor, ...]
    """The config and the layers of a manifest."""
    manifests: tuple[Descriptor, ...]
    """The manifests of an index."""


_DECODER: Final = msgspec.json.Decoder(_WireManifest)


def parse_manifest(data: bytes) -> ManifestContent:
    """Return what the manifest or index in *data* points at. Raises `FormatError`."""
    try:
        wire = _DECODER.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"not a manifest: {error}") from error
    if wire.schema_version != 2:
        raise FormatError(f"manifest schema version {wire.schema_version} is not supported")
    blobs = ([wire.config] if wire.config else []) + (wire.layers or [])
    return ManifestContent(
        wire.media_type,
        tuple(map(_descriptor, blobs)),
        tuple(map(_descriptor, wire.manifests or [])),
    )


def _descriptor(wire: _WireDescriptor) -> Descriptor:
    if not 0 <= wire.size <= MAX_BLOB_SIZE:
        raise FormatError("not a descriptor: no blob has such a size")
    try:
        digest = Digest.parse(wire.digest)
    except BadDigest as error:
        raise FormatError(f"not a descriptor: {error}") from error
    return Descriptor(wire.media_type, digest, wire.size, wire.annotations or {})


def toc_digest_of(layer: Descriptor) -> Digest | None:
    """Return the digest of the *layer*'s table of contents, if its annotations name one."""
    text = layer.annotations.get(_TOC_DIGEST)
    if text is None:
        return None
    try:
        return Digest.parse(text)
    except BadDigest:
        return None  # a malformed promise is no promise: the layer is read without it


class ErrorCode(Enum):
    """Codes of distribution-spec, "Error Codes", that a read-only mirror has use for."""

    BLOB_UNKNOWN = "BLOB_UNKNOWN"
    MANIFEST_UNKNOWN = "MANIFEST_UNKNOWN"
    NAME_INVALID = "NAME_INVALID"
    NAME_UNKNOWN = "NAME_UNKNOWN"
    DIGEST_INVALID = "DIGEST_INVALID"
    SIZE_INVALID = "SIZE_INVALID"
    UNSUPPORTED = "UNSUPPORTED"
    TOO_MANY_REQUESTS = "TOOMANYREQUESTS"


def error_body(code: ErrorCode, message: str) -> bytes:
    """Return the JSON body of an error answer."""
    # A request's bytes that are not UTF-8 reach us as surrogates, which JSON cannot carry.
    readable = message.encode("utf-8", "backslashreplace").decode("utf-8")
    return msgspec.json.encode({"errors": [{"code": code.value, "message": readable}]})
