"""How peers prove to each other that they know the cluster secret.

A request carries a time and a keyed hash over that time and everything that decides its answer;
an answer that cannot be checked by its own digest carries one over the request's proof and the
body. The secret itself never travels. A replayed request can only read again, within the time
window, what its sender read.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Final

REQUEST_HEADER: Final = "P2PCache-Proof"
REPLY_HEADER: Final = "P2PCache-Reply-Proof"

# Clocks of nodes differ; a day would be too long for a proof that was overheard.
MAX_CLOCK_SKEW_S: Final = 600.0

_PROOF = re.compile(r"v1 (\d{1,12}) ([0-9a-f]{64})", re.ASCII)


def prove_request(secret: bytes, method: str, target: str, range_header: str, *, now: float) -> str:
    """Return the header value for a request. *now* is Unix time, *target* the path and query."""
    moment = str(int(now))
    return f"v1 {moment} {_request_mac(secret, method, target, range_header, moment)}"


def check_request(
    secret: bytes, proof: str, method: str, target: str, range_header: str, *, now: float
) -> bool:
    """Say whether *proof* was made with *secret* for this very request, not long ago."""
    match = _PROOF.fullmatch(proof)
    if match is None or abs(now - int(match[1])) > MAX_CLOCK_SKEW_S:
        return False
    expected = _request_mac(secret, method, target, range_header, match[1])
    return hmac.compare_digest(expected, match[2])


def prove_reply(secret: bytes, request_proof: str, body: bytes) -> str:
    """Return the header value for an answer with *body* to the request of *request_proof*."""
    return _mac(secret, b"reply", _bytes(request_proof), hashlib.sha256(body).digest())


def check_reply(secret: bytes, proof: str, request_proof: str, body: bytes) -> bool:
    """Say whether *body* was sent by a node that knows *secret*, in answer to this request."""
    expected = prove_reply(secret, request_proof, body)
    return hmac.compare_digest(_bytes(expected), _bytes(proof))


def _request_mac(secret: bytes, method: str, target: str, range_header: str, moment: str) -> str:
    fields = ("request", method, target, range_header, moment)
    return _mac(secret, *map(_bytes, fields))


def _mac(secret: bytes, *fields: bytes) -> str:
    # Each field's length stands before it, so that no other fields make the same message.
    message = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return hmac.new(secret, message, "sha256").hexdigest()


def _bytes(text: str) -> bytes:
    # aiohttp hands on what is not UTF-8 as surrogates; this spells any text, each differently.
    return text.encode("utf-8", "surrogatepass")
