import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.model import Digest, Tag
from p2pcache.demo.registry import Answer, Contents, answer
from p2pcache.demo.replay import split_multipart

BLOB = bytes(range(100))
MANIFEST = b'{"schemaVersion":2}'
MEDIA_TYPE = "application/vnd.oci.image.manifest.v1+json"
REPOSITORIES = {
    "team/app": Contents(
        manifests={Digest.of(MANIFEST): (MEDIA_TYPE, MANIFEST)},
        tags={Tag("v1"): Digest.of(MANIFEST)},
        blobs={Digest.of(BLOB): BLOB},
    )
}
BLOB_PATH = f"/v2/team/app/blobs/{Digest.of(BLOB)}"


def ask(path: str, *, method: str = "GET", range_header: str = "") -> Answer:
    return answer(REPOSITORIES, method, path, range_header)


def body(reply: Answer) -> bytes:
    return b"".join(bytes(part) for part in reply.parts)


@pytest.mark.parametrize("reference", ["v1", str(Digest.of(MANIFEST))])
def test_a_manifest_is_found_by_tag_and_by_digest(reference):
    reply = ask(f"/v2/team/app/manifests/{reference}")
    assert (reply.status, body(reply)) == (200, MANIFEST)
    assert reply.headers["Content-Type"] == MEDIA_TYPE
    assert reply.headers["Docker-Content-Digest"] == str(Digest.of(MANIFEST))


@given(st.integers(0, 99), st.integers(0, 150))
def test_one_range_gives_its_bytes_and_the_size_of_the_whole(first, extra):
    last = min(first + extra, 99)
    reply = ask(BLOB_PATH, range_header=f"bytes={first}-{first + extra}")
    assert (reply.status, body(reply)) == (206, BLOB[first : last + 1])
    assert reply.headers["Content-Range"] == f"bytes {first}-{last}/100"


def test_several_ranges_give_a_part_each():
    reply = ask(BLOB_PATH, range_header="bytes=0-1,50-59")
    parts = split_multipart(reply.headers["Content-Type"], body(reply))
    assert [data for _, data in parts] == [BLOB[0:2], BLOB[50:60]]


def test_a_range_past_the_end_reports_the_size():
    reply = ask(BLOB_PATH, range_header="bytes=100-")
    assert (reply.status, reply.headers["Content-Range"]) == (416, "bytes */100")


@pytest.mark.parametrize(
    ("method", "path", "range_header", "status", "code"),
    [
        ("GET", "/v2/team/app/manifests/v2", "", 404, "MANIFEST_UNKNOWN"),
        ("GET", f"/v2/team/app/blobs/{Digest.of(b'')}", "", 404, "BLOB_UNKNOWN"),
        ("GET", "/v2/other/blobs/v1", "", 404, "NAME_UNKNOWN"),
        ("GET", "/v2/team/app/blobs/v1", "", 400, "DIGEST_INVALID"),
        ("GET", "/v2/team/app/blobs/sha256:12", "", 400, "DIGEST_INVALID"),
        ("GET", BLOB_PATH, "bytes=5-2", 400, "RANGE_INVALID"),
        ("GET", "/elsewhere", "", 404, "UNSUPPORTED"),
        ("PUT", BLOB_PATH, "", 405, "UNSUPPORTED"),
    ],
)
def test_a_refusal_says_why_in_the_words_of_the_specification(
    method, path, range_header, status, code
):
    reply = ask(path, method=method, range_header=range_header)
    assert reply.status == status
    assert json.loads(body(reply))["errors"][0]["code"] == code


def test_the_tags_are_listed():
    assert json.loads(body(ask("/v2/team/app/tags/list"))) == {"name": "team/app", "tags": ["v1"]}


PATHS = st.lists(
    st.sampled_from(
        ["", "v2", "team", "app", "blobs", "manifests", "tags", "list", "v1", "é", ".."]
    )
    | st.just(str(Digest.of(BLOB))),
    max_size=7,
).map(lambda parts: "/" + "/".join(parts))


@given(st.sampled_from(["GET", "HEAD", "POST", "BREW"]), PATHS | st.text(), st.text(max_size=30))
def test_any_request_is_answered(method, path, range_header):
    assert ask(path, method=method, range_header=range_header).status in {200, 206, 400, 404, 405}
