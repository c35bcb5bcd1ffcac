"""The addresses of members, as text.

Hides what may be one. The rule: an address that other machines tell is asked of the name service
and written into requests, so that nothing passes here which either of them cannot take.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

_MAX_SIZE: Final = 255
# RFC 1035, section 2.3.4, for the length of a label; underscores are common in private zones.
_HOST: Final = re.compile(r"(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?")
_ADDRESS: Final = re.compile(
    rf"(?:\[([0-9A-Fa-f:.]{{2,45}}(?:%[A-Za-z0-9_.-]{{1,32}})?)\]|({_HOST.pattern})):([0-9]{{1,5}})"
)


def split_address(text: str) -> tuple[str, int]:
    """Return the host and port of ``HOST:PORT`` or ``[IPV6]:PORT``. Raises `ValueError`."""
    match = _ADDRESS.fullmatch(text) if len(text) <= _MAX_SIZE else None
    if match is None or int(match[3]) > 65535:
        raise ValueError(f"not HOST:PORT or [IPV6]:PORT: {text[:_MAX_SIZE]!r}")
    if match[1]:
        ipaddress.IPv6Address(match[1])
    return match[1] or match[2], int(match[3])


def is_address(text: str) -> bool:
    """Say whether `split_address` takes *text*."""
    try:
        split_address(text)
    except ValueError:
        return False
    return True


def check_host(host: str) -> None:
    """Raise `ValueError` unless *host* is a name that can be looked up, or an IP address."""
    if ":" in host:
        ipaddress.IPv6Address(host)
    elif len(host) > _MAX_SIZE or not _HOST.fullmatch(host):
        raise ValueError(
            f"not a host name of ASCII letters, digits, '-' and '_', each part of at most 63: "
            f"{host[:_MAX_SIZE]!r} (others are written as xn--…)"
        )
