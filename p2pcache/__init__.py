"""A registry mirror for every node: containers start lazily from their neighbours' chunks.

The way of a read
-----------------

::

    client ─► server ─► mirror ─► held? ──────────────► store ─► answer
                          │                              ▲
                          └─ not held: locate ─► fetch ─► prove ─► store
                              (coordinators)   (a peer, else the upstream)

A blob is cut into *pieces*, along the members of its table of contents if a manifest vouches for
one, else every 1 MiB. Pieces are the unit of fetching, proving, storing and sharing. Every node
cuts a blob alike, so that "piece 7" means the same bytes everywhere.

How nodes share one read
------------------------

Sixty-four consecutive pieces are a *region*, and every region has a *coordinator*: the node that a
hash of the region and the list of members names, the same on all nodes without asking anyone. A
node that lacks pieces tells the coordinator what it has and what it wants, in one claim; the answer
names, for each piece, who holds it or is just getting it, or grants a *lease*: leave to read it
from the upstream, for a short time. Whoever is sent to another node is one to whom the next are
sent, so that the askers form a tree; a node that is asked for what is still on its way to it holds
the request until it has come. Where there are zones, a zone's coordinator has one of its nodes read
from beyond, and the coordinators of the whole cluster tell that one from where.

::

    claim: I hold these, I am getting those, I want these
      └─► coordinator ─► ask this one (it has them, or is getting them)
                      ─► or read these yourself: a lease
                      ─► or ask again in a moment

What a coordinator knows is in its memory alone, and made anew from what nodes say. Nothing waits
for any of it without a bound: `core.bounds` says for how long, and what happens then. A plain layer
is shared in the same way, with one difference: its pieces cannot be proven one by one, so that each
is taken only from the node that read it from the upstream, and none is seen before all are there
and the layer's digest matched.

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

``core``      decisions without I/O: parsers, layouts, proof, plans, placement, the coordinator,
              what is remembered of peers
``ports``     the seams between the mirror and the world
``mirror``    the pipeline: opening a blob, fetching pieces, reading answers, manifests and tags
``store``     pieces on disk, safe against kill -9; the memory of manifests and tags
``content``   blobs that containerd's content store has already, read in place
``upstream``  registries: tokens, redirects, retries
``pacing``    limits of bytes a second
``peers``     the other nodes: who they are, claims and announcements, how well each has served
``server``    HTTP for clients, peers and operators; the short path for held ranges
``app``       builds a node out of these and takes it down again
``demo``      the main job on one machine

Imports point down this list of layers and never up or sideways; the contracts are in
``pyproject.toml`` and checked with every change.
"""

__version__ = "0.1.0"
