"""Reading from registries: one deep module, `p2pcache.upstream.client`, and what it is made of.

``endpoint`` says where a registry is and how patiently it is asked, ``transport`` sends one
request, ``auth`` and ``credentials`` get in, ``redirects`` remembers where the bytes really are,
``backoff`` decides when not to ask, ``intake`` keeps this node's own limit. Only the client is
meant to be used from outside.
"""
