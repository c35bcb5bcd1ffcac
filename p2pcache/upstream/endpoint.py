"""Where registries are and how patiently they are asked.

The rule it keeps: https, unless the operator wrote ``http://`` for that very registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from yarl import URL

from p2pcache.core.dockerconfig import DOCKER_HUB
from p2pcache.core.errors import ConfigError

# The host of Docker Hub's API is not the name that its images carry.
_WELL_KNOWN: Final = {
    DOCKER_HUB: "https://registry-1.docker.io",
    "index.docker.io": "https://registry-1.docker.io",
}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, how often to try. Every wait on a registry is bounded by one of these."""

    connect_s: float = 5.0
    """To look up the name, connect and shake hands."""
    headers_s: float = 10.0
    """From the request to the answer's headers."""
    progress_s: float = 10.0
    """Between two blocks of a body."""
    total_s: float = 30.0
    """For a whole question with a small answer, retries included."""
    slowest_bytes_per_s: int = 64 * 1024
    """A read may take `total_s` and this long for its bytes."""
    attempts: int = 3
    """Tries without progress, the first included."""
    pause_s: float = 0.2
    """Before the second try; doubles with each, and varies by half."""
    retry_after_s: float = 10.0
    """A Retry-After up to this is waited for; a longer one is told to the caller."""


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    """What the upstream client needs to know. Registries not named are at ``https://HOST``."""

    endpoints: Mapping[str, str] = field(default_factory=dict)
    """Where a registry really is: its host as in image names, to a URL."""
    ca_file: Path | None = None
    """Certificates (PEM) to trust beside the system's."""
    registry_config: Path | None = None
    """A docker config.json; read again when it changes."""
    patience: Patience = Patience()
    connections_per_registry: int = 64
    """Requests in flight to one registry and its storage. Others wait."""
    waiting_per_registry: int = 4096
    """Requests that may wait for a connection; more are refused at once."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One registry: its name, and the URL above ``/v2/``."""

    registry: str
    base: URL

    @classmethod
    def of(cls, registry: str, configured: str | None) -> Endpoint:
        """Return the endpoint of *registry*, at the *configured* URL if there is one.

        Raises `ConfigError` if that is not an http or https URL, or if it holds a password.
        """
        text = configured or _WELL_KNOWN.get(registry) or f"https://{registry}"
        try:
            base = URL(text)
            usable = base.scheme in ("http", "https") and base.host and base.port
        except ValueError:
            usable = False
        if not usable or base.user or base.password or base.query_string or base.fragment:
            raise ConfigError([f"upstream of {registry}: not a plain http or https URL"])
        return cls(registry, base)

    @property
    def source(self) -> str:
        """The name that errors carry."""
        return f"upstream {self.registry}"

    @property
    def is_plain(self) -> bool:
        """The operator asked for plain http."""
        return self.base.scheme == "http"

    def owns(self, url: URL) -> bool:
        """Say whether *url* is at the registry's own scheme, host and port."""
        return origin(url) == origin(self.base)

    def url(self, path: str) -> URL:
        """Return the URL of *path*, which stands below ``/v2/`` and is encoded."""
        return self.base.with_path(f"{self.base.raw_path.rstrip('/')}/v2/{path}", encoded=True)


def origin(url: URL) -> tuple[str, str, int]:
    """Return scheme, host and port (RFC 6454); a default port is the same said or unsaid."""
    return (url.scheme, (url.host or "").lower(), url.port or 0)


def check_endpoints(config: UpstreamConfig) -> None:
    """Raise `ConfigError`, with every problem, if a configured URL cannot be used."""
    problems: list[str] = []
    for registry, url in config.endpoints.items():
        try:
            Endpoint.of(registry, url)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
