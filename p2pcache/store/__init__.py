"""Blobs on disk: a bounded, crash-proof cache of pieces, and the memory of manifests and tags.

Hides where bytes lie, how they are committed, checked and evicted. The rules it keeps:

* Bytes first, then the row that speaks of them. A piece counts as stored once its row is committed,
  so ``kill -9`` at any instant leaves at worst bytes without a row, which nobody sees.
* Nothing held is ever overwritten. A piece that is replaced or dropped stops counting in memory
  before its bytes change on disk.
* Every piece carries an xxh3_64. It is checked when the piece is first read, and again later on:
  rotten blocks, and pages that a power loss tore, are found then and dropped. The hash finds
  accidents, not attackers: proof of peers' bytes happens before they come here.

On disk, under one directory::

    lock                      flock: whoever has it writes, others read (hand-over at a restart)
    catalog.sqlite            which blobs, which pieces in which state; manifests, tags, facts
    data/<2 hex>/<hex>        one sparse file per blob, each piece at its own offset

The parts, from the bottom up:

``files``     data files, their descriptors, the lock
``catalog``   the rows: schema, reading all of it at open, setting a broken one aside
``writer``    the one thread that changes the disk: everything queued goes into one transaction
``disk``      the directory as this process may use it: lock, hand-over, threads, bounded waits
``rot``       reading a data file against the hashes of its pieces
``blobs``     one blob in memory, and reading, writing, proving and dropping its pieces
``owner``     what a blob asks of the store, which is above it
``memory``    manifests, tags and facts: all in memory, written through
``store``     the composition: which blobs there are, budget and eviction

All that a hit needs is in memory after opening; the event loop never waits for SQLite, and touches
a file only for a read that the page cache answers at once.
"""

from p2pcache.store.blobs import StoredBlob as StoredBlob
from p2pcache.store.memory import ImageMemory as ImageMemory
from p2pcache.store.store import Store as Store
from p2pcache.store.store import StoreStats as StoreStats
