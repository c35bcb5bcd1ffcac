"""HTTP on this node's side: what clients, peers and operators ask of it.

`mirror_api` is the OCI distribution API for containerd and lazy snapshotters, `short_path` the
fast lane of its commonest request, `peer_api` what other nodes read, `status_api` health and
metrics, `listeners` the sockets. Handlers turn HTTP into calls of the mirror and back; they decide
nothing else.
"""
