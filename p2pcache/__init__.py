"""A registry mirror for every node: containers start lazily from their neighbours' chunks.

The way of a read
-----------------

::

    client ─► server ─► mirror ─► held? ──────────────► store ─► answer
                          │                              ▲
                          └─ not held: locate ─► fetch ─► prove ─► store
                                      (peers)   (a peer, else the upstream)

A blob is cut into *pieces*, along the members of its table of contents if a manifest vouches for
one, else every 1 MiB. Pieces are the unit of fetching, proving, storing and sharing. Every node
cuts a blob alike, so that "piece 7" means the same bytes everywhere.

What makes it trustworthy
-------------------------

* No byte of a peer is served, stored as held, or passed on before it is proven: each chunk of the
  piece matches the table of contents, which matches the manifest, which matches its own digest; or
  the whole blob matches its digest.
* Proof by chunks is enough for clients that check chunks. Whoever reads a blob to its end checks
  the blob's digest, and is served only bytes read from the upstream by this node, or bytes of a
  blob that is whole.
* A peer that sent wrong bytes is shunned for a time that doubles with each lie.

Where things are
----------------

``core``      decisions without I/O: parsers, layouts, proof, plans, what is remembered of peers
``ports``     the seams between the mirror and the world
``mirror``    the pipeline: opening a blob, fetching pieces, reading answers, manifests and tags
``store``     pieces on disk, safe against kill -9; the memory of manifests and tags
``upstream``  registries: tokens, redirects, retries
``peers``     the other nodes: who holds what, how well each has served
``server``    HTTP for clients, peers and operators; the short path for held ranges
``app``       builds a node out of these and takes it down again
``demo``      the main job on one machine

Imports point down this list of layers and never up or sideways; the contracts are in
``pyproject.toml`` and checked with every change.
"""

__version__ = "0.1.0"
