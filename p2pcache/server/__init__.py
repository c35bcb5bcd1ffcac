"""HTTP on this node's side: what clients, peers and operators ask of it.

`mirror_api` is the OCI distribution API for containerd and lazy snapshotters, `peer_api` what other
nodes read; `short_path` and `peer_path` are the fast lanes (`lane`) of their commonest requests.
`status_api` is health and metrics, `listeners` the sockets. Handlers turn HTTP into calls of the
mirror and back; they decide nothing else.
"""
