"""A file that is not proven yet, and how urgent that is.

The rule: whoever proves it can be hurried, and stopped, from the event loop at any time.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

from p2pcache.content.files import FileState
from p2pcache.core.model import Digest


@dataclass(slots=True, eq=False)
class Candidate:
    """A file that is not proven yet. There may be very many: what takes memory is made late."""

    digest: Digest
    state: FileState
    is_asked: bool = False
    is_urgent: bool = False
    """Somebody waits, or it has just come: to be proven at full speed."""
    is_running: bool = False
    is_stopped: bool = False
    tries: int = 0
    """How often the file changed while it was being proven."""
    _hurry: threading.Event | None = None
    _done: asyncio.Event | None = None

    def __lt__(self, other: Candidate) -> bool:
        return False  # Of two states of one file, either may come first: one of them is outdated.

    def start(self) -> None:
        """It is being proven from now on."""
        self.is_running = True
        self._hurry = threading.Event()
        if self.is_urgent:
            self._hurry.set()

    def urge(self) -> None:
        """Prove it at full speed, even if that has begun slowly."""
        self.is_urgent = True
        if self._hurry is not None:
            self._hurry.set()

    def stop(self) -> None:
        """The file is not in this state any more, or the node stops."""
        self.is_stopped = True
        self.urge()
        self.finish()

    def finish(self) -> None:
        """It is proven, or will not be."""
        if self._done is not None:
            self._done.set()

    async def until_done(self) -> None:
        """Wait for `finish`."""
        if self._done is None:
            self._done = asyncio.Event()
        await self._done.wait()

    def pause(self, bytes_per_s: float, count: int) -> bool:
        """Slow a prover down that has read *count* bytes, if nobody waits. On its thread."""
        if self._hurry is not None:
            self._hurry.wait(count / bytes_per_s)
        return not self.is_stopped
