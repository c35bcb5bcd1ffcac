"""The main job on one machine: several nodes lazily start one image, and who read what is counted.

Hides a registry, an image made of this machine's own Python, a client that asks as the stargz
snapshotter asks, and real ``p2pcache serve`` processes between them. The rule it keeps: nothing is
simulated inside p2pcache, and every file that a client reads is compared with the original.

| module | hides |
|---|---|
| `image` | which files go into the image, and how it becomes a manifest and blobs |
| `registry` | a small read-only OCI registry on loopback that counts what it sends |
| `replay` | the request pattern of containerd and the stargz snapshotter at a container's start |
| `nodes` | child processes: flags, readiness, counters, and their end |
| `report` | the table and the JSON document |
| `compare` | the order of it all, and which bytes count as whose |
| `run` | flags, progress, output, exit code |
"""
