"""What a blob needs of the store that owns it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from p2pcache.store.disk import Disk

if TYPE_CHECKING:
    from p2pcache.store.blobs import StoredBlob


class Owner(Protocol):
    """What a blob needs of its store."""

    disk: Disk
    clock: Callable[[], float]
    scratch: memoryview
    read_flags: int

    def note_pinned(self, blob: StoredBlob) -> None:
        """The blob is read or written from now on."""

    def note_unpinned(self, blob: StoredBlob) -> None:
        """Nobody reads or writes it any more."""

    def take_room(self, size: int, blob: StoredBlob) -> None:
        """Count *size* bytes for *blob*, evicting others. Raises `StoreFull`."""

    def give_room(self, size: int, blob: StoredBlob) -> None:
        """Count *size* bytes less."""

    def note_dropped(self, size: int, blob: StoredBlob) -> None:
        """Pieces that took *size* bytes are absent from now on."""

    def note_open(self, blob: StoredBlob) -> None:
        """The blob has a descriptor open now."""

    def note_rot(self, blob: StoredBlob, pieces: list[int]) -> None:
        """Pieces did not match their hash."""

    def lose(self, blob: StoredBlob) -> None:
        """The blob's file is not there."""
