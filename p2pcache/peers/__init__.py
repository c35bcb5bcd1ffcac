"""The other nodes, as this one sees them.

`client` speaks the peer API (``/p2p/v1/``) to one node. `neighbours` knows all of them: whom to ask
for what, how each has served, and whom to leave alone.
"""
