"""Digests, names and descriptors: a value that exists is a valid one."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.errors import (
    BadDigest,
    BadName,
    BlobUnavailable,
    ConfigError,
    IntegrityError,
    P2PCacheError,
    SourceUnavailable,
    StoreCorrupt,
    StoreLacksPiece,
)
from p2pcache.core.model import (
    Descriptor,
    Digest,
    Manifest,
    Repository,
    Tag,
    parse_reference,
    parse_registry,
)

HEX = "0123456789abcdef"
DIGESTS = st.one_of(
    st.builds(Digest, st.just("sha256"), st.text(HEX, min_size=64, max_size=64)),
    st.builds(Digest, st.just("sha512"), st.text(HEX, min_size=128, max_size=128)),
)
WORDS = st.text("abz09", min_size=1, max_size=5)
COMPONENTS = st.lists(WORDS | st.sampled_from([".", "_", "__", "-", "---"]), min_size=1, max_size=7)


@st.composite
def repositories(draw):
    separators = st.sampled_from([".", "_", "__", "-", "---", "/"])
    name = draw(WORDS) + "".join(
        draw(separators) + draw(WORDS) for _ in range(draw(st.integers(0, 5)))
    )
    registry = draw(st.sampled_from(["docker.io", "localhost:5000", "[::1]:5000", "10.0.0.1"]))
    return Repository(registry, name)


# Digests.


@given(DIGESTS)
def test_a_printed_digest_is_read_back(digest):
    assert Digest.parse(str(digest)) == digest
    assert parse_reference(str(digest)) == digest
    assert str(digest).endswith(digest.encoded)
    assert digest.encoded.startswith(digest.short)
    assert len(digest.short) == 12


@given(st.text(max_size=140) | st.from_regex(r"\Asha(256|512):[0-9a-fA-F]{0,130}\Z"))
def test_any_text_is_a_digest_or_refused(text):
    try:
        digest = Digest.parse(text)
    except BadDigest:
        return
    assert str(digest) == text
    assert len(digest.encoded) == hashlib.new(digest.algorithm).digest_size * 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 65,
        "sha256:" + "a" * 128,
        "sha512:" + "a" * 64,
        "sha256:" + "A" * 64,
        "sha256:" + "g" * 64,
        "sha1:" + "a" * 40,
        "md5:" + "a" * 64,
        "sha256-" + "a" * 64,
        "sha256:" + "a" * 64 + "\n",
        " sha256:" + "a" * 64,
        "sha256:" + "٣" * 64,
        "sha256:" + "a" * 100_000,
    ],
)
def test_what_is_no_digest_is_refused(text):
    with pytest.raises(BadDigest) as caught:
        Digest.parse(text)
    assert caught.value.text == text
    assert len(str(caught.value)) < 400


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_a_digest_matches_the_bytes_it_was_made_of_and_no_others(data, other):
    assert Digest.of(data).matches(memoryview(data))
    assert Digest.of(bytearray(data)) == Digest.of(memoryview(data))
    assert Digest.of(data).matches(other) is (data == other)
    longer = Digest("sha512", hashlib.sha512(data).hexdigest())
    assert longer.matches(data)
    assert longer.matches(other) is (data == other)


# Names.


@given(repositories())
def test_a_repository_is_read_as_it_was_built(repository):
    assert Repository.parse(repository.registry, repository.name) == repository
    assert str(repository) == f"{repository.registry}/{repository.name}"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "a/",
        "/a",
        "a//b",
        ".",
        "..",
        "../a",
        "a/../b",
        "a/./b",
        "a..b",
        "a___b",
        "a._b",
        "-a",
        "a-",
        "A",
        "a b",
        "a%2fb",
        "a\\b",
        "a:b",
        "a@b",
        "a?b",
        "a\n",
        "ä",
        "a" * 256,
        "a-" * 127 + "--",
    ],
)
def test_what_is_no_repository_name_is_refused(name):
    with pytest.raises(BadName) as caught:
        Repository.parse("docker.io", name)
    assert caught.value.text == name
    assert len(str(caught.value)) < 400


def test_a_repository_name_may_be_long_and_deep():
    name = "/".join(["a"] * 128)
    assert len(name) == 255
    assert Repository.parse("docker.io", name).name == name


@given(st.text(max_size=20) | COMPONENTS.map("".join) | COMPONENTS.map("/".join))
def test_any_text_is_a_name_or_refused(text):
    for parse in (
        lambda: Repository.parse("docker.io", text).name,
        lambda: str(Tag.parse(text)),
    ):
        try:
            assert parse() == text
        except BadName:
            continue


@pytest.mark.parametrize("text", ["a", "_", "v1.2.3-rc_1", "1" * 128, "A.-_"])
def test_a_tag_is_read(text):
    assert parse_reference(text) == Tag(text)
    assert str(Tag(text)) == text


@pytest.mark.parametrize("text", ["", ".a", "-a", "a" * 129, "a/b", "a b", "a\n", "é", "a+b"])
def test_what_is_no_tag_is_refused(text):
    with pytest.raises(BadName):
        parse_reference(text)


def test_a_reference_with_a_colon_must_be_a_digest():
    with pytest.raises(BadDigest):
        parse_reference("v1:2")


@pytest.mark.parametrize(
    "text",
    [
        "docker.io",
        "localhost",
        "localhost:5000",
        "10.0.0.1:80",
        "[::1]",
        "[2001:db8::1]:5000",
        "xn--bcher-kva.example",
        "a" * 254,
    ],
)
def test_a_registry_host_is_read(text):
    assert parse_registry(text) == text


def test_a_registry_host_is_the_same_in_any_case():
    assert parse_registry("Docker.IO:443") == "docker.io:443"
    assert Repository.parse("GHCR.io", "a") == Repository.parse("ghcr.io", "a")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-a",
        "a-",
        "a.",
        ".a",
        "a/b",
        "a b",
        "a:",
        "a:123456",
        "a:b",
        "https://a",
        "user@a",
        "::1",
        "[::1",
        "[::1]]",
        "[evil.example]",
        "a\r\nX: y",
        "a?b",
        "a#b",
        "bücher.example",
        "a" * 300,
    ],
)
def test_what_is_no_registry_host_is_refused(text):
    with pytest.raises(BadName):
        parse_registry(text)


# Descriptors and the like.


def test_a_descriptor_has_a_size():
    digest = Digest.of(b"x")
    assert Descriptor("t", digest, 0).annotations == {}
    with pytest.raises(ValueError, match="not a size"):
        Descriptor("t", digest, -1)


def test_descriptors_of_the_same_blob_are_equal_whatever_is_noted_on_them():
    digest = Digest.of(b"x")
    noted = Descriptor("t", digest, 1, {"a": "b"})
    assert noted == Descriptor("t", digest, 1)
    assert len({noted, Descriptor("t", digest, 1)}) == 1


def test_the_bytes_of_a_manifest_do_not_show_in_logs():
    assert "secret" not in repr(Manifest(Digest.of(b"secret"), "t", b"secret"))


# Errors carry facts.


def test_errors_carry_what_their_handlers_need():
    gone = BlobUnavailable("blob x", missing=True)
    assert (str(gone), gone.missing, gone.reason) == ("blob x", True, "")
    assert str(BlobUnavailable("blob x", missing=False, reason="down")) == "blob x: down"
    slow = SourceUnavailable("peer a", "429", retry_after_s=3.0)
    assert (slow.source, slow.reason, slow.retry_after_s) == ("peer a", "429", 3.0)
    assert str(IntegrityError("peer a", "wrong bytes")) == "peer a: wrong bytes"
    assert str(StoreLacksPiece("blob x", 3)) == "blob x: piece 3 is not stored"
    rotten = StoreCorrupt("blob x", 3)
    assert (str(rotten), rotten.piece) == ("blob x: piece 3 is rotten", 3)
    assert ConfigError(["a", "b"]).problems == ["a", "b"]
    assert all(isinstance(e, P2PCacheError) for e in (gone, slow, rotten, BadName("tag", "")))
