"""The other nodes, as this one sees them.

`client` speaks the peer API (``/p2p/v1/``) to one node, over `connections` that bring in one
`answer` after the other; `members` knows all nodes, how each has
served, and whom to leave alone. `locator` finds out where pieces are: it sends claims to their
coordinators (`posting`), tells them what this node has (`announcing`), or asks around (`asking`).
`coordination` is this node's own part as a coordinator. All four see the members through the
protocols in `directory`.
"""
