"""How peers prove to each other that they know the cluster secret.

A request carries a time and a keyed hash over that time and everything that decides its answer, its
body included; an answer that cannot be checked by its own digest carries one over the request's
proof and the body. The secret itself never travels. A replayed request can only repeat, within the
time window, what its sender asked.

The window is the answering node's: a request that is right but for its time is told what time it is
there, under a proof of its own, and its sender asks again by that clock. So nodes whose clocks are
hours apart still share, and nobody without the secret can move a clock.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from enum import Enum
from typing import Final

REQUEST_HEADER: Final = "P2PCache-Proof"
REPLY_HEADER: Final = "P2PCache-Reply-Proof"
CLOCK_HEADER: Final = "P2PCache-Clock"

# Clocks of nodes differ; a day would be too long for a proof that was overheard.
MAX_CLOCK_SKEW_S: Final = 600.0

# The digest of the body stands in the proof, so that a body need not be read to refuse a stranger.
_PROOF = re.compile(r"v1 (\d{1,12}) ([0-9a-f]{64})(?: ([0-9a-f]{64}))?", re.ASCII)
_CLOCK = re.compile(r"v1 (\d{1,12}) ([0-9a-f]{64})", re.ASCII)


class Verdict(Enum):
    """What a request's proof is worth."""

    PROVEN = "proven"
    STALE = "stale"
    """Made with the secret for this request, but at another time than the clock here says."""
    UNPROVEN = "unproven"


def prove_request(
    secret: bytes, method: str, target: str, range_header: str, body: bytes = b"", *, now: float
) -> str:
    """Return the header value for a request. *now* is Unix time, *target* the path and query."""
    moment = str(max(0, int(now)))
    body_digest = _body_digest(body)
    mac = _request_mac(secret, method, target, range_header, moment, body_digest)
    return f"v1 {moment} {mac} {body_digest}".rstrip()


def judge_request(
    secret: bytes, proof: str, method: str, target: str, range_header: str, *, now: float
) -> Verdict:
    """Say whether *proof* was made with *secret* for this very request, and not long ago.

    A request with a body is proven only once `proves_body` holds, too.
    """
    match = _PROOF.fullmatch(proof)
    if match is None:
        return Verdict.UNPROVEN
    expected = _request_mac(secret, method, target, range_header, match[1], match[3] or "")
    if not hmac.compare_digest(expected, match[2]):
        return Verdict.UNPROVEN
    is_recent = abs(now - int(match[1])) <= MAX_CLOCK_SKEW_S
    return Verdict.PROVEN if is_recent else Verdict.STALE


def proves_body(proof: str, body: bytes) -> bool:
    """Say whether *proof*, which must have been found right, was made for *body*."""
    match = _PROOF.fullmatch(proof)
    return match is not None and (match[3] or "") == _body_digest(body)


def prove_reply(secret: bytes, request_proof: str, body: bytes) -> str:
    """Return the header value for an answer with *body* to the request of *request_proof*."""
    return _mac(secret, b"reply", _bytes(request_proof), hashlib.sha256(body).digest())


def check_reply(secret: bytes, proof: str, request_proof: str, body: bytes) -> bool:
    """Say whether *body* was sent by a node that knows *secret*, in answer to this request."""
    expected = prove_reply(secret, request_proof, body)
    return hmac.compare_digest(_bytes(expected), _bytes(proof))


def prove_clock(secret: bytes, request_proof: str, *, now: float) -> str:
    """Return the header value that tells the sender of *request_proof* what time it is here."""
    moment = str(max(0, int(now)))
    return f"v1 {moment} {_mac(secret, b'clock', _bytes(request_proof), _bytes(moment))}"


def check_clock(secret: bytes, clock: str, request_proof: str) -> float | None:
    """Return the time that a node that knows *secret* told in answer to this request, or None."""
    match = _CLOCK.fullmatch(clock)
    if match is None:
        return None
    now = float(match[1])
    expected = prove_clock(secret, request_proof, now=now)
    return now if hmac.compare_digest(expected, clock) else None


def _request_mac(
    secret: bytes, method: str, target: str, range_header: str, moment: str, body_digest: str
) -> str:
    fields = ["request", method, target, range_header, moment]
    if body_digest:
        fields.append(body_digest)
    return _mac(secret, *map(_bytes, fields))


def _body_digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest() if body else ""


def _mac(secret: bytes, *fields: bytes) -> str:
    # Each field's length stands before it, so that no other fields make the same message.
    message = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return hmac.digest(secret, message, "sha256").hex()


def _bytes(text: str) -> bytes:
    # aiohttp hands on what is not UTF-8 as surrogates; this spells any text, each differently.
    return text.encode("utf-8", "surrogatepass")
