"""Every setting of ``p2pcache serve``: one flag and one ``P2PCACHE_…`` variable each.

Flags win over variables, variables over defaults. The only reader of the environment. All problems
are reported at once, each with the flag that it is about.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from p2pcache.core.address import check_host, split_address
from p2pcache.core.errors import BadName, ConfigError
from p2pcache.core.model import parse_registry

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*((?:[KMGT]i?)?)B?", re.ASCII | re.IGNORECASE)
# Bits as tc(8) writes them. A small "b" could mean either: it is not taken.
_RATE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGTkmgt]i?)?(bit|Bit|B|)(?:/s)?", re.ASCII)
# What Kubernetes allows as the value of a label, such as topology.kubernetes.io/zone.
_ZONE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_UNITS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
# Nodes take whoever is slower than this for dead: the limit would only make reads fail.
_MIN_RATE: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a host and a port."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_reachable(self) -> bool:
        """Another node could connect to it: a real port, and not just any address of a machine."""
        try:
            return self.port > 0 and not ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return self.port > 0

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Config:
    """How one node runs. Every default together is a working one-node mirror."""

    store: Path = Path("/var/lib/p2pcache")
    """Where pieces are kept. Survives restarts; may be deleted at any time."""
    store_size: int = 20 << 30
    """Bytes that the store may take."""
    mirror_listen: Address = Address("127.0.0.1", 29900)
    """Where containerd and lazy snapshotters read."""
    mirror_for: Mapping[str, Address] = field(default_factory=dict)
    """Listeners for one registry each, for clients that do not say which registry they mean."""
    mirror_exposed: bool = False
    """The mirror may listen where other machines reach it. It asks its clients for nothing."""
    peer_listen: Address = Address("0.0.0.0", 29901)
    """Where other nodes read. Loopback only as long as there is no cluster secret."""
    advertise: Address | None = None
    """Where other nodes reach this one's peer listener, as their own lists of peers name it. If
    not given it is the address listened on, or else found by recognising itself among `peers`."""
    zone: str = ""
    """Where this node runs, such as a zone of the cloud: nearer nodes are asked first."""
    status_listen: Address = Address("127.0.0.1", 29902)
    """Health and metrics."""
    node_name: str = ""
    """What this node calls itself in logs and to its peers: the host name unless given."""
    upstream: Mapping[str, str] = field(default_factory=dict)
    """Where a registry really is, as a URL. Plain http is used only where this says so."""
    upstream_ca: Path | None = None
    """Certificates, beside the system's, that an upstream may use."""
    registry_config: Path | None = None
    """A docker config.json with the credentials for upstreams."""
    peers: tuple[str, ...] = ()
    """The URLs of the other nodes' peer listeners. This node's own is recognised and ignored."""
    cluster_secret: bytes | None = field(default=None, repr=False)
    """What nodes prove to each other to know."""
    tag_max_age_s: float = 7 * 24 * 3600.0
    """For how long a remembered tag may answer for an upstream that fails. Seconds."""
    upload_limit: int | None = None
    """Bytes a second that this node gives to peers; None is no limit."""
    upstream_limit: int | None = None
    """Bytes a second that it reads from all registries together; None is no limit."""
    max_uploads: int = 256
    """Answers to peers at once; above that they are told to ask another node."""
    containerd_content: Path | None = None
    """containerd's content store on this machine: what it has whole is served from there."""
    drain_timeout_s: float = 25.0
    """How long a stopping node goes on with the answers it has begun. Seconds."""
    log_format: str = "json"
    """``json`` or ``text``."""
    log_level: str = "info"
    """``debug``, ``info``, ``warning`` or ``error``."""

    def advertised(self, listening: Address) -> str:
        """Where other nodes reach this one, "" if that is not known yet.

        *listening* is the address of the peer listener, its port the one that it has got.
        """
        address = self.advertise or listening
        return str(address) if address.is_reachable else ""


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``serve``. Values stay text until `read_config` parses them all."""
    for flag, (metavar, text, _, many) in _FLAGS.items():
        parser.add_argument(
            f"--{flag}",
            metavar=metavar,
            action="append" if many else "store",
            help=f"{text} [{_variable(flag)}]",
        )


def read_config(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Config:
    """Return the configuration. Raises `ConfigError` with every problem found."""
    problems: list[str] = []
    values: dict[str, Any] = {}
    for flag, (_, _, parse, many) in _FLAGS.items():
        given = getattr(arguments, flag.replace("-", "_"))
        if given is None:
            variable = environment.get(_variable(flag), "").strip()
            if not variable:
                continue
            given = variable.replace(",", " ").split() if many else variable
        elif not many and not given.strip():
            # Most likely a script's unset variable; it must not turn into another meaning.
            problems.append(f"--{flag}: is empty")
            continue
        try:
            values[flag] = parse(given)
        except (ValueError, BadName) as error:
            problems.append(f"--{flag}: {error}")
        except OSError as error:
            problems.append(f"--{flag}: cannot read {error.filename}: {error.strerror}")
    problems += _exposed(values)
    if problems:
        raise ConfigError(problems)
    values.setdefault("node-name", socket.gethostname())
    names = {"peer": "peers", "cluster-secret-file": "cluster_secret"}
    names |= {"tag-max-age": "tag_max_age_s", "drain-timeout": "drain_timeout_s"}
    return Config(**{names.get(k, k.replace("-", "_")): v for k, v in values.items()})


def _exposed(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with mirrors that other machines would reach without leave."""
    given = {"--mirror-listen": values.get("mirror-listen")}
    given |= {f"--mirror-for {host}": at for host, at in values.get("mirror-for", {}).items()}
    return [
        f"{flag}: {address} is reachable from other machines, which then read every image that "
        "this node may read; use 127.0.0.1, or add --mirror-exposed yes"
        for flag, address in given.items()
        if address and not address.is_loopback and not values.get("mirror-exposed")
    ]


def process_environment() -> Mapping[str, str]:
    """The environment of this process."""
    return os.environ  # noqa: TID251 - this module is its only reader


def interpreter() -> str:
    """The Python that runs this process, to start more of its kind."""
    return sys.executable


def _variable(flag: str) -> str:
    return "P2PCACHE_" + flag.upper().replace("-", "_")


def parse_size(text: str) -> int:
    """Return the bytes that *text*, such as ``20GiB`` or ``500MB``, stands for."""
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].lower() if match else ""
    base = 1024 if unit.endswith("i") else 1000
    size = int(float(match[1]) * base ** _UNITS[unit.removesuffix("i")]) if match else 0
    if size < 1:
        raise ValueError(f"not a size such as 20GiB: {text!r}")
    return size


def parse_rate(text: str) -> int | None:
    """Return the bytes a second that ``10MB/s``, ``1GiB`` or ``100Mbit`` stands for; None for 0."""
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a rate such as 10MB/s (bytes) or 100Mbit (bits): {text!r}")
    unit = (match[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    rate = float(match[1]) * base ** _UNITS[unit.removesuffix("i")]
    if match[3].endswith("it"):
        rate /= 8
    if 0 < rate < _MIN_RATE:
        raise ValueError(f"less than 64KiB/s is no use; 0 is no limit: {text!r}")
    return int(rate) or None


def parse_address(text: str) -> Address:
    """Return the address that ``HOST:PORT`` or ``[IPV6]:PORT`` stands for. Raises `ValueError`."""
    return Address(*split_address(text.strip()))


def _reachable(text: str) -> Address:
    address = parse_address(text)
    if not address.is_reachable:
        raise ValueError(f"other nodes cannot connect to {address}")
    return address


def _zone(text: str) -> str:
    if not _ZONE.fullmatch(text.strip()):
        raise ValueError(f"not a name of at most 63 letters, digits, '-', '_' and '.': {text!r}")
    return text.strip()


def _pairs(parse_value: Callable[[str], Any]) -> Callable[[Sequence[str]], dict[str, Any]]:
    def parse(texts: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for text in texts:
            _refuse_credentials(text)
            registry, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"not HOST=…: {text!r}")
            registry = parse_registry(registry)
            if registry in found:
                raise ValueError(f"{registry} is given twice")
            found[registry] = parse_value(value)
        return found

    return parse


def _url(text: str) -> str:
    _refuse_credentials(text)
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"not an http or https URL: {text!r}")
    check_host(parts.hostname)
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError(f"a URL is spelled in ASCII without spaces: {text!r}")
    if "?" in text or "#" in text:
        raise ValueError(f"a URL to add paths to has no query and no fragment: {text!r}")
    return text.rstrip("/")


def _refuse_credentials(text: str) -> None:
    # Before anything else is said of *text*, since other messages quote it.
    if "@" in text:
        raise ValueError("credentials belong into --registry-config, not into a URL")


def _urls(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(_url, texts)))


def _secret(text: str) -> bytes:
    secret = Path(text).read_bytes().strip()
    if len(secret) < 16:
        raise ValueError("a cluster secret has at least 16 bytes; try: openssl rand -hex 32")
    return secret


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError(f"not a number of seconds: {text!r}")
    return value


def _count(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d{0,5}", text.strip(), re.ASCII):
        raise ValueError(f"not a number from 1 to 999999: {text!r}")
    return int(text)


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"not one of {', '.join(choices)}: {text!r}")
        return text.lower()

    return parse


def _readable(text: str) -> Path:
    path = Path(text)
    with path.open("rb"):
        return path


# flag: (value's name, help, parser, may be given several times)
_FLAGS: Final[dict[str, tuple[str, str, Callable[[Any], Any], bool]]] = {
    "store": ("DIR", "where pieces are kept (/var/lib/p2pcache)", Path, False),
    "store-size": ("SIZE", "how much the store may take (20GiB)", parse_size, False),
    "mirror-listen": (
        "ADDR:PORT",
        "where containerd and snapshotters read (127.0.0.1:29900)",
        parse_address,
        False,
    ),
    "mirror-for": (
        "HOST=ADDR:PORT",
        "one more listener, for clients that mean registry HOST without saying so",
        _pairs(parse_address),
        True,
    ),
    "mirror-exposed": (
        "yes|no",
        "let other machines than this one read through the mirror (no)",
        lambda text: _choice("yes", "no")(text) == "yes",
        False,
    ),
    "peer-listen": (
        "ADDR:PORT",
        "where other nodes read (0.0.0.0:29901; loopback without a cluster secret)",
        parse_address,
        False,
    ),
    "advertise": (
        "ADDR:PORT",
        "where other nodes reach the peer listener, as their --peer names it (found out)",
        _reachable,
        False,
    ),
    "zone": ("NAME", "where this node runs; nodes of one zone share first (none)", _zone, False),
    "status-listen": ("ADDR:PORT", "health and metrics (127.0.0.1:29902)", parse_address, False),
    "node-name": ("NAME", "what this node calls itself (the host name)", str, False),
    "upstream": (
        "HOST=URL",
        "where registry HOST really is (https://HOST); plain http only where given here",
        _pairs(_url),
        True,
    ),
    "upstream-ca": ("FILE", "more certificates (PEM) to trust in upstreams", _readable, False),
    "registry-config": (
        "FILE",
        "docker config.json with credentials for upstreams; re-read when it changes",
        Path,
        False,
    ),
    "peer": ("URL", "the peer listener of another node, http://ADDR:PORT", _urls, True),
    "cluster-secret-file": (
        "FILE",
        "the secret that all nodes share; without it peers are served on loopback only",
        _secret,
        False,
    ),
    "tag-max-age": (
        "SECONDS",
        "for how long a remembered tag may stand in for a failing upstream (604800)",
        _seconds,
        False,
    ),
    "upload-limit": (
        "RATE",
        "bytes a second given to peers, such as 50MB/s or 400Mbit (0: no limit)",
        parse_rate,
        False,
    ),
    "upstream-limit": (
        "RATE",
        "bytes a second read from all registries together (0: no limit)",
        parse_rate,
        False,
    ),
    "max-uploads": ("N", "answers to peers at once (256)", _count, False),
    "containerd-content": (
        "DIR",
        "containerd's io.containerd.content.v1.content, to serve whole blobs from; only read",
        Path,
        False,
    ),
    "drain-timeout": (
        "SECONDS",
        "how long a stopping node goes on with answers it has begun (25)",
        _seconds,
        False,
    ),
    "log-format": ("json|text", "how log lines look (json)", _choice("json", "text"), False),
    "log-level": (
        "LEVEL",
        "debug, info, warning or error (info)",
        _choice("debug", "info", "warning", "error"),
        False,
    ),
}
