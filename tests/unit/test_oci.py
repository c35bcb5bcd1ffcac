"""Paths of the distribution API, manifests, and error bodies."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.errors import BadDigest, BadName, FormatError
from p2pcache.core.model import MAX_BLOB_SIZE, Descriptor, Digest, Repository, Tag
from p2pcache.core.oci import (
    ErrorCode,
    Resource,
    Route,
    error_body,
    parse_manifest,
    parse_path,
    toc_digest_of,
)

A = Digest.of(b"a")
B = Digest.of(b"b")
WORDS = [
    "a",
    "blobs",
    "manifests",
    "referrers",
    "tags",
    "list",
    "v2",
    "",
    "..",
    "%2e%2e",
    "v1",
    "_",
]

ESTARGZ = "application/vnd.oci.image.layer.v1.tar+gzip"
ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"


# Paths.


def test_the_base_is_recognised():
    assert parse_path("/v2/") == parse_path("/v2") == Route(Resource.BASE)


@pytest.mark.parametrize(
    "name", ["a", "library/alpine", "a/blobs", "blobs/manifests", "manifests/v1", "x/tags/list"]
)
def test_every_resource_of_any_repository_is_recognised(name):
    assert parse_path(f"/v2/{name}/blobs/{A}") == Route(Resource.BLOB, name, A)
    assert parse_path(f"/v2/{name}/manifests/{A}") == Route(Resource.MANIFEST, name, A)
    assert parse_path(f"/v2/{name}/manifests/v1.2") == Route(Resource.MANIFEST, name, Tag("v1.2"))
    assert parse_path(f"/v2/{name}/manifests/list") == Route(Resource.MANIFEST, name, Tag("list"))
    assert parse_path(f"/v2/{name}/referrers/{A}") == Route(Resource.REFERRERS, name, A)
    assert parse_path(f"/v2/{name}/tags/list") == Route(Resource.TAGS, name)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/v1/",
        "/v2x/",
        "v2/",
        "//v2/",
        "/v2/a",
        "/v2/a/",
        "/v2/a/b",
        "/v2/_catalog",
        "/v2/a/blobs/",
        "/v2/a/blobs",
        f"/v2/blobs/{A}",
        f"/v2//blobs/{A}",
        "/v2/a/tags/other",
        "/v2/tags/list",
        "/v2/a/blobs/uploads/",
        "/v2/a/Blobs/x",
        f"/V2/a/blobs/{A}",
        f"/v2/a/blobs/{A}/",
        "/v2/" + "a/" * 600 + f"blobs/{A}",
        "/v2/" + "/" * 100_000,
    ],
)
def test_other_paths_are_none_of_ours(path):
    assert parse_path(path) is None


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/v2/a/blobs/x", BadDigest),
        ("/v2/a/blobs/..", BadDigest),
        ("/v2/a/blobs/sha256:abc", BadDigest),
        ("/v2/a/blobs/uploads", BadDigest),
        (f"/v2/a/blobs/{A}%00", BadDigest),
        ("/v2/a/referrers/v1", BadDigest),
        ("/v2/a/manifests/sha256:abc", BadDigest),
        ("/v2/a/manifests/..", BadName),
        ("/v2/a/manifests/%76", BadName),
        ("/v2/a/manifests/" + "a" * 129, BadName),
        ("/v2/a/manifests/v 1", BadName),
    ],
)
def test_a_malformed_last_part_is_refused(path, error):
    with pytest.raises(error):
        parse_path(path)


@pytest.mark.parametrize("name", ["..", "../etc", "a/../b", "a%2fb", "a//b", "%2e%2e", "A"])
def test_a_strange_repository_never_becomes_one(name):
    route = parse_path(f"/v2/{name}/blobs/{A}")
    assert route is not None
    with pytest.raises(BadName):
        Repository.parse("docker.io", route.name)


@given(
    st.one_of(
        st.text(max_size=60),
        st.lists(st.sampled_from([*WORDS, str(A)]), max_size=8).map(lambda w: "/v2/" + "/".join(w)),
    )
)
def test_any_path_gives_a_route_that_spells_it_or_our_error(path):
    try:
        route = parse_path(path)
    except (BadDigest, BadName):
        return
    match route:
        case None:
            return
        case Route(Resource.BASE):
            assert path in ("/v2", "/v2/")
        case Route(Resource.TAGS):
            assert path == f"/v2/{route.name}/tags/list"
        case Route(Resource.BLOB):
            assert path == f"/v2/{route.name}/blobs/{route.reference}"
        case Route(resource):
            assert path == f"/v2/{route.name}/{resource.value.rstrip('s')}s/{route.reference}"


# Manifests.


def descriptor(digest=A, size=10, **more):
    return {"mediaType": ESTARGZ, "digest": str(digest), "size": size, **more}


def manifest(**fields):
    return json.dumps({"schemaVersion": 2, **fields}).encode()


def test_a_manifest_points_at_its_config_and_then_at_its_layers():
    media_type = "application/vnd.oci.image.manifest.v1+json"
    content = parse_manifest(
        manifest(
            mediaType=media_type,
            config=descriptor(B, 3),
            layers=[descriptor(A, 10, annotations={"k": "v"}), descriptor(B, 0)],
            subject=descriptor(),
            annotations={"x": "y"},
        )
    )
    assert content.media_type == media_type
    assert content.blobs == (
        Descriptor(ESTARGZ, B, 3),
        Descriptor(ESTARGZ, A, 10),
        Descriptor(ESTARGZ, B, 0),
    )
    assert content.blobs[1].annotations == {"k": "v"}
    assert content.manifests == ()


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    ],
)
def test_an_index_points_at_manifests(media_type):
    content = parse_manifest(
        manifest(
            mediaType=media_type,
            manifests=[descriptor(A, 7, platform={"os": "linux", "architecture": "arm64"})],
        )
    )
    assert content.manifests == (Descriptor(ESTARGZ, A, 7),)
    assert content.blobs == ()


def test_docker_schema_2_has_the_same_shape():
    content = parse_manifest(
        manifest(
            mediaType="application/vnd.docker.distribution.manifest.v2+json",
            config=descriptor(B),
            layers=[descriptor(A, urls=["https://x.example"])],
        )
    )
    assert [blob.digest for blob in content.blobs] == [B, A]


def test_lists_that_go_wrote_as_null_are_empty():
    content = parse_manifest(manifest(config=None, layers=None, manifests=None))
    assert content.blobs == content.manifests == ()
    content = parse_manifest(manifest(layers=[descriptor(annotations=None)]))
    assert content.blobs[0].annotations == {}


def test_docker_schema_1_is_refused():
    with pytest.raises(FormatError, match="version 1"):
        parse_manifest(
            json.dumps({"schemaVersion": 1, "name": "a", "fsLayers": [], "signatures": []}).encode()
        )


def test_of_a_key_given_twice_the_last_counts_as_for_every_other_reader():
    first, second = (json.dumps([descriptor(d)]).encode() for d in (A, B))
    data = b'{"schemaVersion":1,"schemaVersion":2,"layers":%b,"layers":%b}' % (first, second)
    assert parse_manifest(data).blobs == (Descriptor(ESTARGZ, B, 10),)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": {}},
        {"layers": [None]},
        {"layers": ["x"]},
        {"layers": [[]]},
        {"layers": [{}]},
        {"layers": [{"digest": str(A)}]},
        {"layers": [{"size": 1}]},
        {"layers": [descriptor("sha256:abc")]},
        {"layers": [descriptor("")]},
        {"layers": [descriptor(size=-1)]},
        {"layers": [descriptor(size=1.5)]},
        {"layers": [descriptor(size="10")]},
        {"layers": [descriptor(size=True)]},
        {"layers": [descriptor(size=None)]},
        {"layers": [descriptor(size=MAX_BLOB_SIZE + 1)]},
        {"layers": [descriptor(size=10**40)]},
        {"layers": [descriptor(annotations={"a": 1})]},
        {"layers": [descriptor(annotations=[])]},
        {"layers": [descriptor(mediaType=7)]},
        {"config": []},
        {"config": descriptor("md5:x")},
        {"manifests": [descriptor(size=-1)]},
        {"manifests": "x"},
        {"mediaType": None},
        {"schemaVersion": "2"},
        {"schemaVersion": None},
        {"schemaVersion": 3},
    ],
)
def test_a_manifest_of_wrong_types_is_refused(fields):
    with pytest.raises(FormatError) as caught:
        parse_manifest(manifest(**fields))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"2",
        b'{"schemaVersion":2',
        b'{"schemaVersion":2}x',
        b'\xef\xbb\xbf{"schemaVersion":2}',
        b'{"schemaVersion":2,"mediaType":"\xff"}',
        b'{"schemaVersion":2,"mediaType":"\\ud800"}',
        b'{"schemaVersion":NaN}',
        b'{"schemaVersion":1e999}',
        b'{"schemaVersion":' + b"9" * 10_000 + b"}",
        b'{"schemaVersion":2,"x":' + b"[" * 100_000,
        b'{"schemaVersion":2,"x":' + b'{"x":' * 100_000,
        b'{"schemaVersion":2,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"\0" * 100,
    ],
    ids=lambda data: repr(data[:40]),
)
def test_what_is_no_manifest_is_refused(data):
    with pytest.raises(FormatError):
        parse_manifest(data)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(str(A)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["digest", "size", "mediaType", "annotations", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["mediaType", "config", "layers", "manifests", "schemaVersion"]), VALUES
    )
)
def test_any_document_gives_valid_descriptors_or_our_error(fields):
    try:
        content = parse_manifest(manifest(**fields))
    except FormatError:
        return
    for found in (*content.blobs, *content.manifests):
        assert Digest.parse(str(found.digest)) == found.digest
        assert 0 <= found.size <= MAX_BLOB_SIZE


@given(st.binary(max_size=60))
def test_any_bytes_give_a_manifest_or_our_error(data):
    try:
        parse_manifest(data)
    except FormatError:
        return


@given(st.lists(st.tuples(st.integers(0, MAX_BLOB_SIZE), st.binary(max_size=3)), max_size=5))
def test_written_descriptors_are_read_back(blobs):
    layers = [Descriptor(ZSTD, Digest.of(data), size, {"n": "1"}) for size, data in blobs]
    written = [
        descriptor(d.digest, d.size, mediaType=ZSTD, annotations=d.annotations) for d in layers
    ]
    found = parse_manifest(manifest(layers=written)).blobs
    assert found == tuple(layers)
    assert [dict(d.annotations) for d in found] == [{"n": "1"}] * len(layers)


# The digest of the table of contents.


def test_an_estargz_layer_names_its_toc():
    layer = Descriptor(
        ESTARGZ,
        A,
        10,
        {TOC_DIGEST: str(B), "io.containers.estargz.uncompressed-size": "99"},
    )
    assert toc_digest_of(layer) == B


def test_a_zstd_chunked_layer_of_stargz_names_the_toc_in_the_same_place():
    # As nativeconverter/zstdchunked of the stargz snapshotter writes it: the checksum beside it is
    # that of the compressed TOC, which no lazy client checks.
    layer = Descriptor(
        ZSTD,
        A,
        10,
        {
            TOC_DIGEST: str(B),
            "io.containers.zstd-chunked.manifest-checksum": str(A),
            "io.containers.zstd-chunked.manifest-position": "100:20:200:1",
        },
    )
    assert toc_digest_of(layer) == B


@pytest.mark.parametrize(
    "annotations",
    [
        {},
        {"io.github.containers.zstd-chunked.manifest-checksum": str(B)},  # podman's dialect
        {TOC_DIGEST: ""},
        {TOC_DIGEST: "sha256:abc"},
        {TOC_DIGEST.upper(): str(B)},
    ],
)
def test_a_layer_that_names_no_toc_has_none(annotations):
    assert toc_digest_of(Descriptor(ZSTD, A, 10, annotations)) is None


# Errors.


@given(st.sampled_from(ErrorCode), st.text(max_size=20))
def test_an_error_body_is_the_json_of_the_specification(code, message):
    assert json.loads(error_body(code, message)) == {
        "errors": [{"code": code.value, "message": message}]
    }


def test_an_error_about_bytes_that_are_not_text_is_still_json():
    body = json.loads(error_body(ErrorCode.NAME_INVALID, "not a name: \udcff"))
    assert body["errors"][0]["message"] == "not a name: \\udcff"
