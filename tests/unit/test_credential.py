"""Proofs of the cluster secret: made for one request, one moment, one answer."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from p2pcache.core.credential import (
    MAX_CLOCK_SKEW_S,
    Verdict,
    check_clock,
    check_reply,
    judge_request,
    prove_clock,
    prove_reply,
    prove_request,
    proves_body,
)

SECRET = b"correct horse battery staple"
# What aiohttp hands on: any characters, with surrogates for bytes that are not UTF-8.
TEXT = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=12)
REQUESTS = st.tuples(st.binary(max_size=20), TEXT, TEXT, TEXT)
TIMES = st.floats(0, 4e10)


def check_request(*request, now):
    return judge_request(*request, now=now) is Verdict.PROVEN


@given(REQUESTS, TIMES)
def test_a_request_proves_itself(request_, now):
    assert check_request(request_[0], prove_request(*request_, now=now), *request_[1:], now=now)


@given(REQUESTS, REQUESTS)
@example((SECRET, "GET", "/a\n", ""), (SECRET, "GET", "/a", "\n"))
@example((SECRET, "GET", "/a\nb", "c"), (SECRET, "GET", "/a", "b\nc"))
@example((SECRET, "GE", "T/a", ""), (SECRET, "GET", "/a", ""))
@example((SECRET, "GET", "/\udcff", ""), (SECRET, "GET", "/?", ""))
@example((SECRET, "GET", "/a", ""), (SECRET, "HEAD", "/a", ""))
@example((SECRET, "GET", "/a", "bytes=0-1"), (SECRET, "GET", "/a", "bytes=0-2"))
@example((SECRET, "GET", "/a", ""), (SECRET + b"!", "GET", "/a", ""))
def test_any_other_part_of_a_request_makes_the_proof_worthless(made, asked):
    # A shorter key is padded with zeros (RFC 2104): those two are the same secret.
    assume((made[0].rstrip(b"\0"), *made[1:]) != (asked[0].rstrip(b"\0"), *asked[1:]))
    proof = prove_request(*made, now=1e9)
    assert not check_request(asked[0], proof, *asked[1:], now=1e9)


@pytest.mark.parametrize(
    ("off", "accepted"),
    [
        (0, True),
        (MAX_CLOCK_SKEW_S, True),
        (-MAX_CLOCK_SKEW_S, True),
        (MAX_CLOCK_SKEW_S + 1, False),
        (-MAX_CLOCK_SKEW_S - 1, False),
        (1e12, False),
    ],
)
def test_a_proof_lasts_as_long_as_clocks_may_differ(off, accepted):
    request = ("GET", "/p2p/v1/blobs/x", "bytes=0-1")
    proof = prove_request(SECRET, *request, now=1e9)
    verdict = judge_request(SECRET, proof, *request, now=1e9 + off)
    assert verdict is (Verdict.PROVEN if accepted else Verdict.STALE)


def test_the_time_in_a_proof_cannot_be_changed():
    request = ("GET", "/", "")
    version, _, mac = prove_request(SECRET, *request, now=1000.0).split(" ")
    forged = f"{version} 1001 {mac}"
    assert judge_request(SECRET, forged, *request, now=1000.0) is Verdict.UNPROVEN
    # Nor is its sender told the time.
    assert judge_request(SECRET, forged, *request, now=1e9) is Verdict.UNPROVEN


def test_a_proof_does_not_hold_the_secret():
    proof = prove_request(SECRET, "GET", "/", "", now=1e9)
    assert SECRET.decode() not in proof
    assert SECRET.hex() not in proof


@pytest.mark.parametrize("change", [str.upper, str.strip, lambda p: p + " ", lambda p: p + "\n"])
def test_a_proof_has_one_spelling(change):
    proof = prove_request(SECRET, "GET", "/", "", now=1e9)
    assert check_request(SECRET, change(proof), "GET", "/", "", now=1e9) is (change(proof) == proof)


@given(TEXT | st.from_regex(r"\Av1 [0-9]{0,14} [0-9a-f]{60,70}\Z"))
@example("")
@example("v1 ٣ " + "0" * 64)
@example("v1 1000000000 " + "0" * 64)
@example("v2 1000000000 " + "0" * 64)
@example("v1 " + "9" * 100_000)
def test_any_other_text_is_no_proof(proof):
    assert not check_request(SECRET, proof, "GET", "/", "", now=1e9)
    assert not check_reply(SECRET, proof, "", b"")


# Requests with a body.


@given(st.binary(max_size=9), st.binary(max_size=9), st.binary(max_size=9))
@example(SECRET, b"body", b"")
@example(SECRET, b"", b"body")
def test_a_body_is_proven_and_no_other(secret, body, other):
    proof = prove_request(secret, "POST", "/claims", "", body, now=1e9)
    assert check_request(secret, proof, "POST", "/claims", "", now=1e9)
    assert proves_body(proof, body)
    assert proves_body(proof, other) is (body == other)


def test_the_digest_of_a_body_cannot_be_changed_taken_away_or_added():
    with_body = prove_request(SECRET, "POST", "/claims", "", b"a", now=1e9)
    other = prove_request(SECRET, "POST", "/claims", "", b"b", now=1e9)
    without = prove_request(SECRET, "POST", "/claims", "", now=1e9)
    assert len(without.split(" ")) == 3
    head, digest = with_body.rsplit(" ", 1)
    for forged in (
        head,
        head + " " + other.rsplit(" ", 1)[1],
        without + " " + digest,
        with_body + " " + digest,
        with_body.upper(),
    ):
        assert not check_request(SECRET, forged, "POST", "/claims", "", now=1e9)
    assert not proves_body("nonsense", b"a")


def test_a_body_does_not_pass_for_a_range():
    proof = prove_request(SECRET, "GET", "/a", "x", b"body", now=1e9)
    moved = proof.rsplit(" ", 1)[0]
    assert not check_request(SECRET, moved, "GET", "/a", "x", now=1e9)


# Clocks.


@given(st.binary(max_size=9), TEXT, TIMES)
def test_a_clock_is_told(secret, proof, now):
    assert check_clock(secret, prove_clock(secret, proof, now=now), proof) == int(now)


@given(
    st.tuples(st.binary(max_size=9), TEXT),
    st.tuples(st.binary(max_size=9), TEXT),
)
def test_a_clock_is_told_to_one_request_by_one_secret(made, got):
    assume((made[0].rstrip(b"\0"), made[1]) != (got[0].rstrip(b"\0"), got[1]))
    assert check_clock(got[0], prove_clock(*made, now=5.0), got[1]) is None


@given(TEXT | st.from_regex(r"\Av1 [0-9]{0,14} [0-9a-f]{60,70}\Z"))
@example("")
@example("v1 ٣ " + "0" * 64)
@example("v1 1000 " + "0" * 64)
def test_any_other_text_is_no_clock(text):
    assert check_clock(SECRET, text, "proof") is None


def test_no_other_proof_is_a_clock_and_a_clock_is_no_other_proof():
    request = prove_request(SECRET, "GET", "/", "", now=1000.0)
    assert check_clock(SECRET, request, request) is None
    assert check_clock(SECRET, f"v1 1000 {prove_reply(SECRET, request, b'1000')}", request) is None
    clock = prove_clock(SECRET, request, now=1000.0)
    assert not check_reply(SECRET, clock.split(" ")[2], request, b"1000")
    assert not check_request(SECRET, clock, "GET", "/", "", now=1000.0)


# Answers.


@given(st.binary(max_size=9), TEXT, st.binary(max_size=9))
def test_an_answer_proves_itself(secret, request_proof, body):
    assert check_reply(secret, prove_reply(secret, request_proof, body), request_proof, body)


@given(
    st.tuples(st.binary(max_size=9), TEXT, st.binary(max_size=9)),
    st.tuples(st.binary(max_size=9), TEXT, st.binary(max_size=9)),
)
@example((SECRET, "proof", b"body"), (SECRET, "proof", b"other"))
@example((SECRET, "proof", b"body"), (SECRET, "another", b"body"))
@example((SECRET, "proof", b"body"), (b"another", "proof", b"body"))
def test_an_answer_proves_nothing_else(made, got):
    assume((made[0].rstrip(b"\0"), *made[1:]) != (got[0].rstrip(b"\0"), *got[1:]))
    assert not check_reply(got[0], prove_reply(*made), *got[1:])


def test_a_request_is_no_proof_for_an_answer():
    # Who overhears one must not be able to present it as the other.
    proof = prove_request(SECRET, "GET", "/", "", now=1e9)
    mac = proof.split(" ")[2]
    assert not check_reply(SECRET, mac, proof, b"")
    assert not check_request(
        SECRET, f"v1 1000000000 {prove_reply(SECRET, proof, b'')}", "GET", "/", "", now=1e9
    )
