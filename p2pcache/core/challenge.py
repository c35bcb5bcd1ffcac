"""What a 401 asks for: the WWW-Authenticate header (RFC 9110, section 11.6.1).

Hides a grammar in which commas separate both challenges and their parameters. The rule it keeps:
a challenge is read exactly or refused, since it decides where a password is sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from p2pcache.core.errors import FormatError

# HTTP servers and clients stop at 8 KiB for a field; this bounds what many fields add up to.
MAX_CHALLENGE_BYTES: Final = 32 * 1024

# RFC 9110, section 5.6.2 (token), 5.6.4 (quoted-string), 11.2 (token68). No two
# alternatives can match at the same place, so matching takes linear time.
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_QUOTED = r'"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*"'
_SCHEME = re.compile(_TOKEN)
_TOKEN68 = re.compile(r"[ ]+([A-Za-z0-9\-._~+/]+=*)[ \t]*(?=,|\Z)")
_PARAM = re.compile(rf"({_TOKEN})[ \t]*=[ \t]*({_TOKEN}|{_QUOTED})[ \t]*(?=,|\Z)")
_SPACES = re.compile(r"[ ]+")
_SEPARATORS = re.compile(r"[ \t,]*")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way in that a server offers: *scheme* and the names of *params* are in lower case."""

    scheme: str
    params: Mapping[str, str] = field(default_factory=dict)
    token68: str = ""

    def __str__(self) -> str:
        if self.token68:
            return f"{self.scheme} {self.token68}"
        params = ",".join(f'{name}="{_escape(text)}"' for name, text in self.params.items())
        return f"{self.scheme} {params}".rstrip(" ")


def parse_challenges(fields: Iterable[str]) -> tuple[Challenge, ...]:
    """Return the challenges in all WWW-Authenticate *fields* of one answer, in their order.

    Raises `FormatError`, also if a parameter is given twice: its meaning would be a guess.
    """
    text = ", ".join(fields)
    if len(text) > MAX_CHALLENGE_BYTES:
        raise FormatError(f"challenge of {len(text)} characters")
    found = []
    at = _skip(text, 0)
    while at < len(text):
        challenge, at = _parse_one(text, at)
        found.append(challenge)
    return tuple(found)


def pull_scope(name: str, challenge: Challenge) -> str:
    """Return the scope to ask a token for, to pull from the repository *name*.

    Distribution spec, "Token Scope": ``repository:NAME:ACTIONS``. A registry may know the
    repository by another name than the client does (a proxy with a prefix), which then stands in
    its challenge; never is more asked for than to pull.
    """
    for asked in challenge.params.get("scope", "").split(" "):
        kind, _, rest = asked.partition(":")
        named, _, actions = rest.rpartition(":")
        if kind == "repository" and named and "pull" in actions.split(","):
            return f"repository:{named}:pull"
    return f"repository:{name}:pull"


def _parse_one(text: str, at: int) -> tuple[Challenge, int]:
    """Read the challenge that starts at *at*; also return where the next one starts."""
    scheme = _SCHEME.match(text, at)
    if scheme is None:
        raise FormatError(f"no authentication scheme at character {at}")
    name, at = scheme[0].lower(), scheme.end()
    if token68 := _TOKEN68.match(text, at):
        return Challenge(name, token68=token68[1]), _skip(text, token68.end())
    if at == len(text) or text[at] in ",\t":
        return Challenge(name), _next(text, at)
    spaces = _SPACES.match(text, at)
    if spaces is None:
        raise FormatError(f"no space after the authentication scheme at character {at}")
    at = spaces.end()
    params: dict[str, str] = {}
    # A scheme is never followed by "=", so a match is a parameter of this challenge.
    while param := _PARAM.match(text, at):
        key = param[1].lower()
        if key in params:
            raise FormatError(f"authentication parameter given twice: {key[:40]!r}")
        params[key] = _unquote(param[2])
        at = _skip(text, param.end())
    if not params:
        return Challenge(name), _next(text, at)
    return Challenge(name, params), at


def _next(text: str, at: int) -> int:
    """Step over the comma that must follow a bare scheme."""
    after = _skip(text, at)
    if after < len(text) and "," not in text[at:after]:
        raise FormatError(f"not an authentication parameter at character {at}")
    return after


def _skip(text: str, at: int) -> int:
    found = _SEPARATORS.match(text, at)
    return at if found is None else found.end()


def _unquote(text: str) -> str:
    return _ESCAPE.sub(r"\1", text[1:-1]) if text.startswith('"') else text


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
