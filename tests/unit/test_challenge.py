import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.challenge import (
    MAX_CHALLENGE_BYTES,
    Challenge,
    parse_challenges,
    pull_scope,
)
from p2pcache.core.errors import FormatError

TOKENS = st.text("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)
VALUES = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0x2FF, exclude_characters="\x7f")
    | st.just("\t"),
    max_size=12,
)
TOKEN68 = st.from_regex(r"[A-Za-z0-9\-._~+/]{1,10}={0,2}", fullmatch=True)
CHALLENGES = st.lists(
    st.builds(Challenge, TOKENS, st.dictionaries(TOKENS, VALUES, max_size=3))
    | st.builds(lambda scheme, text: Challenge(scheme, token68=text), TOKENS, TOKEN68),
    max_size=4,
)


def test_docker_hub_is_understood():
    (found,) = parse_challenges(
        [
            'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",'
            'scope="repository:library/alpine:pull",error="invalid_token"'
        ]
    )
    assert found.scheme == "bearer"
    assert found.params == {
        "realm": "https://auth.docker.io/token",
        "service": "registry.docker.io",
        "scope": "repository:library/alpine:pull",
        "error": "invalid_token",
    }


def test_example_of_the_rfc_holds_two_challenges():
    # RFC 9110, section 11.6.1: the commas inside and between challenges look alike.
    found = parse_challenges(
        ['Basic realm="simple", Newauth realm="apps", type=1, title="Login to \\"apps\\""']
    )
    assert found == (
        Challenge("basic", {"realm": "simple"}),
        Challenge("newauth", {"realm": "apps", "type": "1", "title": 'Login to "apps"'}),
    )


def test_fields_of_one_answer_are_read_as_one_list():
    found = parse_challenges(["Negotiate", "NTLM abc==", 'Basic realm = "x y" , , charset=UTF-8'])
    assert found == (
        Challenge("negotiate"),
        Challenge("ntlm", token68="abc=="),
        Challenge("basic", {"realm": "x y", "charset": "UTF-8"}),
    )


def test_nothing_asked_is_no_challenge():
    assert parse_challenges([]) == ()
    assert parse_challenges([" , ,"]) == ()


@pytest.mark.parametrize(
    "text",
    [
        'Bearer realm="unclosed',
        'Bearer realm="a" service="b"',
        'Bearer realm="a",REALM="b"',
        "Bearer realm=https://unquoted.example/token",
        'realm="no scheme"',
        "Bearer\tx=y",
        '"quoted"',
        "Bearer/x",
        'Bearer realm="a\x00b"',
        'Bearer realm="a\r\nb"',
    ],
)
def test_what_is_not_a_challenge_is_refused(text):
    with pytest.raises(FormatError):
        parse_challenges([text])


def test_a_challenge_without_end_is_refused_unread():
    with pytest.raises(FormatError, match="characters"):
        parse_challenges(["Basic " + "a" * MAX_CHALLENGE_BYTES])


@given(st.lists(st.text(max_size=60), max_size=3))
def test_any_text_is_read_or_refused(fields):
    with suppress(FormatError):
        parse_challenges(fields)


@given(
    st.lists(st.sampled_from(['"', "\\", ",", " ", "=", "a", "Basic", "\t", "x=y"]), max_size=30)
)
def test_any_arrangement_of_the_grammars_parts_is_read_or_refused(parts):
    with suppress(FormatError):
        parse_challenges(["".join(parts)])


@given(CHALLENGES)
def test_what_is_printed_is_read_back(challenges):
    assert parse_challenges(map(str, challenges)) == tuple(challenges)


@given(CHALLENGES)
def test_one_field_or_many_is_the_same(challenges):
    assert parse_challenges([", ".join(map(str, challenges))]) == tuple(challenges)


@pytest.mark.parametrize(
    "text",
    [
        "a " * (MAX_CHALLENGE_BYTES // 2),
        "a," * (MAX_CHALLENGE_BYTES // 2),
        "a " + "=" * (MAX_CHALLENGE_BYTES - 2),
        "a" + " " * (MAX_CHALLENGE_BYTES - 1),
        "a x" + "\t" * (MAX_CHALLENGE_BYTES - 3),
        'a b="' + "\\a" * (MAX_CHALLENGE_BYTES // 2 - 3),
        'a b="c",' * (MAX_CHALLENGE_BYTES // 8),
    ],
)
def test_the_longest_field_is_read_in_no_time(text):
    began = time.perf_counter()
    with suppress(FormatError):
        parse_challenges([text])
    assert time.perf_counter() - began < 0.5


def test_the_scope_is_to_pull_and_no_more():
    assert pull_scope("a/b", Challenge("bearer")) == "repository:a/b:pull"
    asked = Challenge("bearer", {"scope": "repository:proxy/a/b:pull,push,delete"})
    assert pull_scope("a/b", asked) == "repository:proxy/a/b:pull"
    for useless in ("registry:catalog:*", "repository:a/b:push", "repository::pull", "x", ""):
        assert pull_scope("a/b", Challenge("bearer", {"scope": useless})) == "repository:a/b:pull"
    two = Challenge("bearer", {"scope": "registry:catalog:* repository:host:5000/b:pull"})
    assert pull_scope("b", two) == "repository:host:5000/b:pull"
