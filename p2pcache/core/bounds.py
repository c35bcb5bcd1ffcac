"""How long nodes wait for each other to agree: the bounds of coordination, in one place.

The rule: whatever fails, a read goes on. A container's read is given up by its snapshotter after
30 s, and people notice after one. So a coordinator that is not known to be alive costs `CLAIM_S`,
three of them in a row less than a second; one that answered a moment ago is believed to be busy for
`ALIVE_CLAIM_S`, once. A source from which nothing comes is doubted after `STALL_S`; and a fetch
that got no byte, and no word of a live lease either, for `FAIL_OPEN_S` reads from the upstream
without leave. How patient a fetch is with sources that do answer, `p2pcache.mirror.patience` says;
with one connection, whoever owns it. All durations are seconds.
"""

from typing import Final

CLAIM_S: Final = 0.3
"""A coordinator that has not answered by then is passed over for the next."""
ALIVE_CLAIM_S: Final = 1.0
"""One that answered within `ALIVE_S` is given so long: it is rather busy than dead, and a stand-in
would lease what it has leased already."""
ALIVE_S: Final = 40.0
"""Longer than from one greeting to the next in a cluster of a hundred."""
COORDINATORS: Final = 3
"""So many coordinators are tried; after that a node reads from the upstream without a lease."""

LEASE_S: Final = 2.0
"""A lease lapses so long after it was granted or last renewed."""
RENEW_S: Final = 0.7
"""A node from which bytes keep coming renews its leases this often."""
MIN_LEASE_AGE_S: Final = 4.0
MAX_LEASE_AGE_S: Final = 15.0
"""However often it is renewed, a lease ends at an age between these two: the coordinator follows
how long leases usually take, so that one slow node does not hold up the others."""

STALL_S: Final = 1.0
"""A peer that is itself still fetching is doubted after so long without a byte, and the coordinator
asked again."""
HOLD_S: Final = 5.0
"""A node that is asked for a piece that is on its way holds the request so long, at most."""
RETRY_S: Final = 0.25
"""When to ask again for pieces that have no source yet."""
ANNOUNCE_S: Final = 0.1
"""News of pieces is collected for so long before it is sent."""

FAIL_OPEN_S: Final = 8.0
"""Without a byte or a sign of life for so long, a node reads from the upstream without a lease."""

FETCHING_S: Final = 5.0
"""A node that said that it is fetching a piece is believed for so long."""
HOLDING_S: Final = 600.0
"""A node that said that it holds a piece is believed for so long."""
REANNOUNCE_S: Final = 240.0
"""A node repeats what it holds this often."""
SETTLE_S: Final = 60.0
"""For so long after a start, or a change of the members, a coordinator takes it that it may have
missed who holds what, and asks around once for each region that it hears of for the first time."""
ASK_AROUND_S: Final = 0.2
"""What that may take; less than `CLAIM_S`, so that who claims is still answered in time."""
