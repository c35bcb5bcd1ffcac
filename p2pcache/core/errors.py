"""The exception tree, sorted by what the caller does next.

Errors carry facts as attributes. An exception of another library never crosses a port: it is
translated where it enters.
"""

from __future__ import annotations


class P2PCacheError(Exception):
    """Any error that p2pcache raises on purpose."""


class RequestError(P2PCacheError):
    """The client asked for something that makes no sense: tell the client."""


class BadDigest(RequestError):
    """Text that is not a digest of a supported algorithm."""

    def __init__(self, text: str) -> None:
        super().__init__(f"not a sha256 or sha512 digest: {_shorten(text)}")
        self.text = text


class BadName(RequestError):
    """Text that is not a repository name, a tag or a registry host."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(f"not a {what}: {_shorten(text)}")
        self.text = text


class BadRange(RequestError):
    """A Range header that is malformed or asks for too many ranges."""


class RangeNotSatisfiable(RequestError):
    """Every requested range starts at or past the end of the blob."""

    def __init__(self, size: int) -> None:
        super().__init__(f"no requested range lies within {size} bytes")
        self.size = size


class RegistryUnknown(RequestError):
    """Neither the request nor anything seen before says which registry is meant."""


class FormatError(P2PCacheError):
    """Bytes that are not what they should be: a footer, a TOC, a manifest, a peer's message."""


class BlobUnavailable(P2PCacheError):
    """No source could deliver.

    *missing* is true if all of them said that they lack it: a plain 404. Otherwise at least one
    failed, and asking again later may help.
    """

    def __init__(self, what: str, *, missing: bool, reason: str = "") -> None:
        super().__init__(f"{what}: {reason}" if reason else what)
        self.what = what
        self.missing = missing
        self.reason = reason

    @classmethod
    def because(cls, what: str, *failures: SourceError) -> BlobUnavailable:
        """Return the error that *failures*, one of each source asked, add up to."""
        reason = "; ".join(dict.fromkeys(map(str, failures)))
        missing = bool(failures) and all(failure.is_final for failure in failures)
        return cls(what, missing=missing, reason=reason)


class SourceError(P2PCacheError):
    """One source failed: ask the next."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source = source
        self.reason = reason

    @property
    def is_final(self) -> bool:
        """The source will say the same when it is asked again."""
        return isinstance(self, SourceLacksBlob | SourceRefused)


class SourceUnavailable(SourceError):
    """Connection, timeout, stall, 5xx or 429: it may work later.

    *retry_after_s* is what the source asked for, if it did.
    """

    def __init__(self, source: str, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(source, reason)
        self.retry_after_s = retry_after_s


class SourceBusy(SourceUnavailable):
    """It has reached a limit of its own and said so at once: ask another one, without penalty."""


class SourceRefused(SourceError):
    """The source wants credentials that we lack, or forbids the read: trying again is no use."""


class SourceLacksBlob(SourceError):
    """404, or a peer that no longer holds what it said: normal, no penalty."""


class IntegrityError(SourceError):
    """Wrong bytes: discard them, blame the source, ask another one."""


class StoreError(P2PCacheError):
    """The disk let us down: serve without it."""


class StoreFull(StoreError):
    """No room within the budget or on the disk: serve without storing."""


class StoreLacksPiece(StoreError):
    """The store does not have the piece, or no longer: fetch it."""

    def __init__(self, what: str, piece: int, reason: str = "is not stored") -> None:
        super().__init__(f"{what}: piece {piece} {reason}")
        self.piece = piece


class StoreCorrupt(StoreLacksPiece):
    """Stored bytes did not match their hash. They have been dropped: fetch them again."""

    def __init__(self, what: str, piece: int) -> None:
        super().__init__(what, piece, "is rotten")


class ConfigError(P2PCacheError):
    """The configuration cannot work. Lists every problem at once."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
