"""All of a blob, gathered from whoever has parts of it, and checked as a whole.

A plain layer can be proven in no other way; and whoever reads a blob to its end checks its digest,
also where the chunks are proven. The rule: peers' bytes that only the whole can prove are on disk
but unseen until it has been checked; if it does not match, the upstream's bytes take their place,
and the peers whose bytes were other ones are blamed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from p2pcache.core.errors import BlobUnavailable, IntegrityError, StoreError
from p2pcache.core.layout import PieceState
from p2pcache.core.model import Digest
from p2pcache.core.pacing import Priority
from p2pcache.mirror.active import UNPROVEN_BY_PEER, ActiveBlob, TocUnusable
from p2pcache.mirror.fetching import Fetcher
from p2pcache.ports import Neighbours, Peer
from p2pcache.tasks import shared_future

logger = logging.getLogger(__name__)

# How much of a blob that is being gathered is asked for at once: a region of fixed pieces.
FILL_BYTES: Final = 64 << 20


class Gatherer:
    """Makes blobs whole. Readers who come together share the work."""

    def __init__(self, tasks: asyncio.TaskGroup, fetcher: Fetcher, neighbours: Neighbours) -> None:
        self._tasks = tasks
        self._fetcher = fetcher
        self._neighbours = neighbours

    async def gather(self, blob: ActiveBlob) -> None:
        """Return once the blob is whole and checked.

        Raises `BlobUnavailable`, `NoRoom` if the store cannot take it, or `TocUnusable`.
        """
        if blob.is_whole:
            return
        self.confirm(blob)
        if blob.assembly is not None:
            await asyncio.shield(blob.assembly)

    async def _gather(self, blob: ActiveBlob, done: asyncio.Future[None]) -> None:
        try:
            await self._fill(blob, ask_peers=True)
            if not await self._confirm(blob):
                await self._replace_doubtful(blob)
            done.set_result(None)
        except BlobUnavailable as error:
            done.set_exception(error)
        except TocUnusable as error:
            done.set_exception(error)
        except (IntegrityError, StoreError) as error:
            done.set_exception(BlobUnavailable(str(blob.digest), missing=False, reason=str(error)))
        except Exception:  # a bug ends here, logged, and the readers get an error
            logger.exception("gather.broken", extra={"digest": str(blob.digest)})
        finally:
            blob.assembly = None
            if not done.done():
                done.set_exception(BlobUnavailable(str(blob.digest), missing=False))

    async def _fill(self, blob: ActiveBlob, *, ask_peers: bool) -> None:
        """Bring every absent piece onto the disk."""
        stored = blob.stored
        if stored is None:
            raise NoRoom(blob.digest)
        with stored.reading():
            while absent := first_absent(blob, range(blob.layout.count), FILL_BYTES):
                # Whoever reads a part of some blob waits for less, and goes first.
                futures = self._fetcher.start(
                    blob, absent, ask_peers=ask_peers, priority=Priority.AHEAD
                )
                # The next ones are asked for while the second half of these is on its way.
                for piece in absent[: len(absent) // 2 + 1]:
                    result = await asyncio.shield(futures[piece])
                    if not await asyncio.shield(result.kept):
                        raise NoRoom(blob.digest)
                with suppress(StoreError):  # the check of the whole will find out what is wrong
                    await stored.hash_ahead()

    async def _confirm(self, blob: ActiveBlob) -> bool:
        if blob.stored is None or not await blob.stored.confirm_whole():
            return False
        blob.contributors.clear()
        return True

    async def _replace_doubtful(self, blob: ActiveBlob) -> None:
        """The whole did not match: take what peers gave from the upstream, and see who lied."""
        stored = blob.stored
        if stored is None:
            raise BlobUnavailable(str(blob.digest), missing=False, reason="the store let go of it")
        doubtful = stored.pieces_in(*UNPROVEN_BY_PEER)
        logger.warning(
            "blob.mismatch",
            extra={"digest": str(blob.digest), "pieces_from_peers": len(doubtful)},
        )
        before = {piece: stored.hash_of(piece) for piece in doubtful}
        givers = dict(blob.contributors)
        await stored.drop(doubtful)
        if not doubtful:
            await stored.drop(range(blob.layout.count))
            raise IntegrityError("upstream", f"{blob.digest} does not match what it serves")
        if doubtful.is_full and len(set(givers.values())) == 1 and len(givers) == len(doubtful):
            # All of it came from one peer: no need to look further, even with the upstream down.
            self._blame(next(iter(givers.values())), blob)
            givers = {}
        await self._fill(blob, ask_peers=False)
        for piece, giver in givers.items():
            if piece in before and stored.hash_of(piece) != before[piece]:
                self._blame(giver, blob)
        if not await self._confirm(blob):
            await stored.drop(range(blob.layout.count))
            raise IntegrityError("upstream", f"{blob.digest} does not match what it serves")

    def _blame(self, peer: Peer, blob: ActiveBlob) -> None:
        error = IntegrityError(peer.name, f"its bytes of {blob.digest} do not match the digest")
        self._neighbours.note(peer, error)

    def confirm(self, blob: ActiveBlob) -> None:
        """Check a blob that has just become complete, so that it can be served as whole."""
        if not blob.is_whole and blob.assembly is None:
            blob.assembly = shared_future()
            work = self._gather(blob, blob.assembly)
            try:
                self._tasks.create_task(work)
            except RuntimeError:  # the node is stopping: nobody is left to be served
                work.close()
                blob.assembly.cancel()
                blob.assembly = None


class NoRoom(BlobUnavailable):
    """The store cannot take the whole blob, so nobody can check it here."""

    def __init__(self, digest: Digest) -> None:
        super().__init__(str(digest), missing=False, reason="no room to gather it")


def first_absent(blob: ActiveBlob, pieces: Iterable[int], limit: int) -> list[int]:
    """Return the first absent ones of *pieces*, up to *limit* bytes but at least one."""
    found: list[int] = []
    size = 0
    for piece in pieces:
        if blob.state_of(piece) is PieceState.ABSENT:
            size += len(blob.layout.range_of(piece))
            if found and size > limit:
                break
            found.append(piece)
    return found
