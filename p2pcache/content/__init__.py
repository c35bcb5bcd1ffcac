"""Blobs that containerd's content store on this machine already has: served from there, not copied.

Hides another program's folder: where its blobs lie, how they come and go, and whether their bytes
are what their names say. The rules it keeps:

* A blob counts as held only once this node has hashed the file itself and its digest matched.
  containerd did so too when it took the blob in, but disks rot, and files may be changed by whoever
  can write there.
* That is believed of one file in one state: another inode, size, or time of change, and it must be
  proven anew. Beside the digest, each MiB has an xxh3_64 that is checked as pieces are read: rotten
  ones put the whole file out of use until it changes.
* The folder is only ever read. It may be missing, vanish, or be replaced: that is no error.

containerd's local store (its ``plugins/content/local``) has ``blobs/ALGORITHM/HEX`` and ``ingest/``
below the folder that is given here. What is being written is in ``ingest``; a finished blob is
renamed into ``blobs``, then gets its time and its read-only mode; it is unlinked when collected.

``files``      descriptors, the state of a file, reading and proving it; all of it blocks
``record``     what was proven, kept over restarts
``folder``     listing the blobs, and hearing when they come and go
``blobs``      one blob, as the mirror reads it
``candidate``  a file that is not proven yet
``content``    the composition: which blobs there are, and the order in which they are proven
``overlay``    the store with these blobs laid over it
"""

from p2pcache.content.blobs import ContentBlob as ContentBlob
from p2pcache.content.content import Content as Content
from p2pcache.content.overlay import Overlay as Overlay
