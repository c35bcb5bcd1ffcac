"""The real stack end to end: containerd, the stargz snapshotter, a registry and p2pcache itself."""
