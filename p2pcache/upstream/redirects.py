"""Where a registry keeps a blob's bytes, remembered until the address lapses.

Hides the rules of following a redirect. The rule it keeps: a redirect never leads from https to
plain http, nor to anything that is not the web. A registry may send us to any address, private
ones included: who may name registries to the mirror thereby decides what this node connects to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from yarl import URL

from p2pcache.core.errors import SourceRefused
from p2pcache.core.expiry import redirect_lifetime_s
from p2pcache.core.model import Digest, Repository
from p2pcache.upstream.bounded import BoundedMap
from p2pcache.upstream.endpoint import Endpoint

# An entry is some two kilobytes, a signed URL above all.
_REMEMBERED: Final = 4096


class RedirectMemory:
    """The last known address of each blob. *now* is monotonic seconds."""

    def __init__(self) -> None:
        self._targets: BoundedMap[tuple[Repository, Digest], tuple[URL, float]] = BoundedMap(
            _REMEMBERED
        )

    def find(self, repository: Repository, digest: Digest, now: float) -> URL | None:
        """Return the address, unless it has lapsed."""
        found = self._targets.get((repository, digest))
        return found[0] if found is not None and now < found[1] else None

    def put(self, repository: Repository, digest: Digest, target: URL, *, until: float) -> None:
        """Remember the address."""
        self._targets.put((repository, digest), (target, until))

    def forget(self, repository: Repository, digest: Digest, target: URL) -> None:
        """Forget this address; another one, learned since, stays."""
        found = self._targets.get((repository, digest))
        if found is not None and found[0] == target:
            self._targets.drop((repository, digest))


def resolve_target(endpoint: Endpoint, url: URL, location: str | None) -> URL:
    """Return where a redirect from *url* leads. Raises `SourceRefused`."""
    if not location:
        raise SourceRefused(endpoint.source, "redirect without a location")
    try:
        # A signature covers the query as it is spelled, so a well-formed URL is not touched.
        well_formed = location.isascii() and location.isprintable() and " " not in location
        target = url.join(URL(location, encoded=well_formed)).with_fragment(None)
        usable = target.scheme in ("http", "https") and target.host and target.port
    except ValueError:
        usable = False
    if not usable:
        raise SourceRefused(endpoint.source, "redirect to what is not a web address")
    if target.user is not None or target.password is not None:
        raise SourceRefused(endpoint.source, "redirect to an address with credentials in it")
    if target.scheme == "http" and not endpoint.is_plain:
        raise SourceRefused(endpoint.source, "redirect from https to plain http")
    return target


def lifetime_s(target: URL, headers: Mapping[str, str], now: float) -> float:
    """Return for how long *target* may be used; *now* is seconds since the epoch."""
    return redirect_lifetime_s(target.query, headers, now)
