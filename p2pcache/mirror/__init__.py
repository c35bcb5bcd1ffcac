"""A read, from the request to its bytes: which pieces, held or not, from whom, proven how.

`service` is what the HTTP side calls. `manifests` answers for manifests and tags. `opening` finds
out how a blob is cut. `fetching` gets pieces: one fetch per piece however many readers wait.
`reading` turns pieces into the bytes of an answer, and decides when unproven upstream bytes may
pass. Nothing here knows HTTP, files or sockets: that is behind `p2pcache.ports`.
"""
