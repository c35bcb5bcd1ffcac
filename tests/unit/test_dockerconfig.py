import base64
import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.dockerconfig import (
    MAX_CONFIG_BYTES,
    MAX_HELPER_BYTES,
    IdentityToken,
    Password,
    RegistryToken,
    parse_docker_config,
    parse_helper_answer,
    server_address,
)
from p2pcache.core.errors import FormatError
from p2pcache.core.model import Repository

SECRETS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


def encoded(username, password):
    return base64.b64encode(f"{username}:{password}".encode()).decode()


def credentials(config, registry, name="team/app"):
    return parse_docker_config(json.dumps(config).encode()).credentials(Repository(registry, name))


def user_for(keys, registry, name="team/app"):
    """The user whose key is chosen: each key's user is the key itself."""
    auths = {key: {"username": key, "password": "p"} for key in keys}
    found = credentials({"auths": auths}, registry, name)
    return None if found is None else found.username


@given(SECRETS.filter(lambda name: ":" not in name), SECRETS)
def test_what_docker_login_writes_is_read_back(username, password):
    config = {"auths": {"r.example": {"auth": encoded(username, password)}}}
    assert credentials(config, "r.example") == Password(username, password)


def test_each_kind_of_secret_is_known():
    auth = encoded("user", "pass")
    entries = {
        "plain.example": {"username": "u", "password": "p", "email": "x@y"},
        "both.example": {"auth": auth, "username": "other", "password": "other"},
        "identity.example": {"auth": auth, "identitytoken": "refresh"},
        "registry.example": {"identitytoken": "refresh", "registrytoken": "bearer"},
        "padded.example": {"auth": base64.b64encode(b"user:pass\x00\x00").decode()},
        "nulls.example": {"auth": None, "username": None},
        "kept-elsewhere.example": {},
    }
    config = {"auths": entries, "HttpHeaders": {"X": "y"}, "experimental": 7}
    assert credentials(config, "plain.example") == Password("u", "p")
    assert credentials(config, "both.example") == Password("user", "pass")
    assert credentials(config, "identity.example") == IdentityToken("refresh")
    assert credentials(config, "registry.example") == RegistryToken("bearer")
    assert credentials(config, "padded.example") == Password("user", "pass")
    assert credentials(config, "nulls.example") is None
    assert credentials(config, "kept-elsewhere.example") is None
    assert credentials(config, "absent.example") is None


@pytest.mark.parametrize("registry", ["docker.io", "index.docker.io", "registry-1.docker.io"])
@pytest.mark.parametrize(
    "key", ["https://index.docker.io/v1/", "index.docker.io", "docker.io", "https://docker.io"]
)
def test_docker_hub_goes_by_many_names(registry, key):
    assert user_for([key], registry) == key


@pytest.mark.parametrize(
    ("key", "registry", "name"),
    [
        ("r.example", "r.example", "app"),
        ("https://r.example/v2/", "r.example", "app"),
        ("http://r.example", "r.example", "app"),
        ("R.Example:5000", "r.example:5000", "app"),
        ("[::1]:5000", "[::1]:5000", "app"),
        ("r.example/team", "r.example", "team/app"),
        ("r.example/team/app", "r.example", "team/app"),
        ("*.dkr.ecr.eu-west-1.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com", "app"),
        ("*.example", "r.example", "app"),
        ("reg*.example", "registry.example", "app"),
    ],
)
def test_a_key_covers_its_registry(key, registry, name):
    assert user_for([key], registry, name) == key


@pytest.mark.parametrize(
    ("key", "registry", "name"),
    [
        ("r.example", "s.example", "app"),
        ("r.example", "r.example:5000", "app"),
        ("r.example", "r.example.evil", "app"),
        ("r.example", "evil-r.example", "app"),
        ("*.example", "a.b.example", "app"),
        ("*", "r.example", "app"),
        ("r.example/team", "r.example", "teammate/app"),
        ("r.example/team/app", "r.example", "team"),
        ("[:]", ":", "app"),
        ("", "r.example", "app"),
        ("https://", "r.example", "app"),
    ],
)
def test_a_key_covers_nothing_else(key, registry, name):
    assert user_for([key], registry, name) is None


def test_the_most_exact_key_wins():
    keys = ["*.example", "r.example", "r.example/team", "r.example/team/app", "*.example/team"]
    assert user_for(keys, "r.example", "team/app") == "r.example/team/app"
    assert user_for(keys, "r.example", "team/other") == "r.example/team"
    assert user_for(keys, "r.example", "other") == "r.example"
    assert user_for(keys, "s.example", "team/x") == "*.example/team"


def test_helpers_are_per_registry_or_for_all():
    config = parse_docker_config(
        json.dumps(
            {"credHelpers": {"gcr.io": "gcloud", "docker.io": "hub"}, "credsStore": "secretservice"}
        ).encode()
    )
    assert config.helper("gcr.io") == "gcloud"
    assert config.helper("registry-1.docker.io") == "hub"
    assert config.helper("r.example") == "secretservice"
    assert parse_docker_config(b"{}").helper("r.example") is None


def test_helpers_know_docker_hub_by_its_old_name():
    assert server_address("docker.io") == "https://index.docker.io/v1/"
    assert server_address("r.example:5000") == "r.example:5000"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"auths": []}',
        b'{"auths": {"r": {"auth": 7}}}',
        b'{"auths": {"r": {"auth": "not base64"}}}',
        b'{"auths": {"r": {"auth": "bm9jb2xvbg=="}}}',
        b'{"auths": {"r": {"auth": "OnBhc3M="}}}',
        b'{"auths": {"r": {"auth": "/////w=="}}}',
        b'{"credsStore": "../../bin/sh"}',
        b'{"credHelpers": {"r": "a/b"}}',
        b'{"auths": ' + b"[" * 5000,
        b" " * (MAX_CONFIG_BYTES + 1),
    ],
)
def test_a_broken_file_is_refused(data):
    with pytest.raises(FormatError):
        parse_docker_config(data)


def test_a_refusal_quotes_no_secret():
    data = json.dumps({"auths": {"r": {"auth": "hunter2-hunter2!"}}}).encode()
    with pytest.raises(FormatError) as caught:
        parse_docker_config(data)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("kind", [IdentityToken("hunter2"), RegistryToken("hunter2")])
def test_secrets_do_not_show(kind):
    assert "hunter2" not in repr(kind)
    config = parse_docker_config(
        json.dumps({"auths": {"r": {"username": "u", "password": "hunter2"}}}).encode()
    )
    assert "hunter2" not in repr(config)


def test_a_helpers_answer_is_a_password_or_a_token():
    answer = b'{"ServerURL":"r","Username":"u","Secret":"p"}'
    assert parse_helper_answer(answer) == Password("u", "p")
    assert parse_helper_answer(b'{"Username":"<token>","Secret":"t"}') == IdentityToken("t")
    assert parse_helper_answer(b'{"Username":"u","Secret":""}') is None


@given(st.binary(max_size=80) | st.just(b"x" * (MAX_HELPER_BYTES + 1)) | st.just(b"[" * 9999))
def test_any_bytes_are_read_or_refused(data):
    with suppress(FormatError):
        parse_helper_answer(data)
    with suppress(FormatError):
        parse_docker_config(data)


JSON = st.recursive(
    st.none() | st.text(max_size=8) | st.integers() | st.booleans(),
    lambda inner: (
        st.dictionaries(
            st.sampled_from(["auths", "auth", "credHelpers", "credsStore", "r", "username"]), inner
        )
        | st.lists(inner, max_size=2)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_json_is_read_or_refused(value):
    with suppress(FormatError):
        parse_docker_config(json.dumps(value).encode()).credentials(Repository("r", "app"))
