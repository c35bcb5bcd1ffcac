"""The configuration: flags, variables, defaults, and what is wrong with them."""

import argparse
import dataclasses
import socket
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2pcache.config import (
    Address,
    Config,
    add_serve_arguments,
    interpreter,
    parse_address,
    parse_rate,
    parse_size,
    process_environment,
    read_config,
)
from p2pcache.core.errors import ConfigError


def parser():
    made = argparse.ArgumentParser()
    add_serve_arguments(made)
    return made


def read(*arguments, **environment):
    variables = {f"P2PCACHE_{name}": value for name, value in environment.items()}
    return read_config(parser().parse_args(arguments), variables)


def problems(*arguments, **environment):
    with pytest.raises(ConfigError) as caught:
        read(*arguments, **environment)
    return caught.value.problems


FLAGS = [
    option.removeprefix("--")
    for action in parser()._actions
    for option in action.option_strings
    if option.startswith("--") and option != "--help"
]


@pytest.fixture
def secret_file(tmp_path):
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    return path


@pytest.fixture
def examples(secret_file):
    """A value for every flag, and what it becomes."""
    here = str(secret_file)
    return {
        "store": ("/data", "store", Path("/data")),
        "store-size": ("5GiB", "store_size", 5 << 30),
        "mirror-listen": ("127.0.0.2:1", "mirror_listen", Address("127.0.0.2", 1)),
        "mirror-for": ("ghcr.io=[::1]:2", "mirror_for", {"ghcr.io": Address("::1", 2)}),
        "mirror-exposed": ("yes", "mirror_exposed", True),
        "peer-listen": ("10.0.0.1:3", "peer_listen", Address("10.0.0.1", 3)),
        "advertise": ("10.0.0.1:7", "advertise", Address("10.0.0.1", 7)),
        "zone": ("eu-west-1a", "zone", "eu-west-1a"),
        "status-listen": ("0.0.0.0:4", "status_listen", Address("0.0.0.0", 4)),
        "node-name": ("n1", "node_name", "n1"),
        "upstream": ("r.example=http://r:5/", "upstream", {"r.example": "http://r:5"}),
        "upstream-ca": (here, "upstream_ca", secret_file),
        "registry-config": ("/c.json", "registry_config", Path("/c.json")),
        "peer": ("http://10.0.0.2:6", "peers", ("http://10.0.0.2:6",)),
        "cluster-secret-file": (here, "cluster_secret", secret_file.read_bytes().strip()),
        "tag-max-age": ("60", "tag_max_age_s", 60.0),
        "upload-limit": ("400Mbit", "upload_limit", 50_000_000),
        "upstream-limit": ("50MiB/s", "upstream_limit", 50 << 20),
        "max-uploads": ("16", "max_uploads", 16),
        "containerd-content": ("/content", "containerd_content", Path("/content")),
        "drain-timeout": ("0.5", "drain_timeout_s", 0.5),
        "log-format": ("TEXT", "log_format", "text"),
        "log-level": ("debug", "log_level", "debug"),
    }


# Every setting.


def test_without_any_setting_the_defaults_make_a_node():
    assert read() == dataclasses.replace(Config(), node_name=socket.gethostname())
    assert Config().mirror_listen.is_loopback


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_sets_its_field_and_so_does_its_variable(flag, examples):
    text, name, value = examples[flag]
    by_flag = read(f"--{flag}", text)
    assert getattr(by_flag, name) == value
    assert getattr(by_flag, name) != getattr(Config(), name)
    by_variable = read(**{flag.upper().replace("-", "_"): f" {text} "})
    assert by_variable == by_flag


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_win_over_variables(flag, examples):
    text, name, value = examples[flag]
    config = read(f"--{flag}", text, **{flag.upper().replace("-", "_"): "\N{SNOWMAN}:"})
    assert getattr(config, name) == value


@pytest.mark.parametrize("flag", FLAGS)
def test_an_empty_variable_is_none(flag):
    assert read(**{flag.upper().replace("-", "_"): "  "}) == read()


@pytest.mark.parametrize("flag", FLAGS)
def test_an_empty_flag_is_a_mistake(flag):
    # An unset variable in somebody's script must not name every node alike, or store in ".".
    (problem,) = problems(f"--{flag}", "")
    assert problem.startswith(f"--{flag}: ")


@pytest.mark.parametrize("flag", FLAGS)
def test_the_help_of_each_flag_names_its_variable(flag):
    text = " ".join(parser().format_help().split())
    variable = f"P2PCACHE_{flag.upper().replace('-', '_')}"
    assert f"[{variable}]" in text


def test_each_field_has_a_flag(examples):
    assert len(FLAGS) == len(set(FLAGS))
    assert set(FLAGS) == set(examples)
    assert {name for _, name, _ in examples.values()} == {
        f.name for f in dataclasses.fields(Config)
    }


def test_what_may_be_given_several_times_is_a_list_in_a_variable():
    flags = read(
        "--mirror-for", "docker.io=127.0.0.1:1", "--mirror-for", "GHCR.io=127.0.0.1:2",
        "--peer", "http://a:1", "--peer", "http://b:2/", "--peer", "http://a:1/",
    )  # fmt: skip
    assert flags.mirror_for == {
        "docker.io": Address("127.0.0.1", 1),
        "ghcr.io": Address("127.0.0.1", 2),
    }
    assert flags.peers == ("http://a:1", "http://b:2")
    variables = read(
        MIRROR_FOR="docker.io=127.0.0.1:1, ghcr.io=127.0.0.1:2", PEER="http://a:1 http://b:2"
    )
    assert variables == flags


# Problems.


def test_all_problems_are_told_at_once_each_with_its_flag(tmp_path):
    missing = tmp_path / "missing"
    found = problems(
        "--store-size", "much", "--log-level", "loud", "--cluster-secret-file", str(missing),
        "--mirror-for", "docker.io", "--mirror-listen", "0.0.0.0:80", "--peer", "ftp://x",
        DRAIN_TIMEOUT="soon", UPSTREAM="docker.io=", NODE_NAME="fine",
    )  # fmt: skip
    assert [problem.partition(":")[0] for problem in found] == [
        "--store-size",
        "--mirror-for",
        "--upstream",
        "--peer",
        "--cluster-secret-file",
        "--drain-timeout",
        "--log-level",
        "--mirror-listen",
    ]
    assert str(missing) in found[4]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("store-size", "0"),
        ("store-size", "-1GiB"),
        ("mirror-listen", "80"),
        ("status-listen", "localhost"),
        ("mirror-for", "=127.0.0.1:1"),
        ("mirror-for", "docker.io=127.0.0.1"),
        ("mirror-for", "docker io=127.0.0.1:1"),
        ("mirror-exposed", "maybe"),
        ("upstream", "docker.io=docker.io"),
        ("upstream", "docker.io=https://"),
        ("upstream", "docker.io=https://h:99999"),
        ("upstream", "docker.io=https://h:0"),
        ("upstream", "docker.io=https://[::1"),
        ("upstream", "docker.io=https://h/?a=b"),
        ("upstream", "docker.io=https://h/#a"),
        ("upstream", "https://h"),
        ("peer", "10.0.0.1:29901"),
        ("peer", "http://"),
        ("upstream-ca", "/does/not/exist"),
        ("cluster-secret-file", "/"),
        ("cluster-secret-file", "a\0b"),
        ("tag-max-age", "-1"),
        ("tag-max-age", "nan"),
        ("tag-max-age", "inf"),
        ("tag-max-age", "1h"),
        ("upload-limit", "fast"),
        ("upload-limit", "-1MB"),
        ("upstream-limit", "100"),
        ("max-uploads", "0"),
        ("max-uploads", "many"),
        ("max-uploads", "1.5"),
        ("max-uploads", "1e3"),
        ("advertise", "10.0.0.1"),
        ("advertise", "10.0.0.1:0"),
        ("advertise", "0.0.0.0:29901"),
        ("advertise", "[::]:29901"),
        ("zone", "two words"),
        ("zone", "-a"),
        ("zone", "zöne"),
        ("zone", "z" * 64),
        ("log-format", "xml"),
    ],
)
def test_a_bad_value_is_told_with_its_flag(flag, value):
    (problem,) = problems(f"--{flag}={value}")
    assert problem.startswith(f"--{flag}: ")


@pytest.mark.parametrize("flag", ["mirror-for", "upstream"])
def test_a_registry_given_twice_is_a_mistake(flag):
    values = {
        "mirror-for": ["a.example=127.0.0.1:1", "A.example=127.0.0.1:2"],
        "upstream": ["a.example=http://b", "A.example=http://c"],
    }[flag]
    (problem,) = problems(f"--{flag}", values[0], f"--{flag}", values[1])
    assert problem == f"--{flag}: a.example is given twice"


# The mirror asks its clients for nothing: no other machine may reach it by mistake.


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "node.example:1", "[fe80::1%1]:1"]
)
def test_an_exposed_mirror_is_refused_unless_allowed_in_so_many_words(address):
    (problem,) = problems("--mirror-listen", address)
    assert "--mirror-exposed yes" in problem
    (problem,) = problems("--mirror-for", f"ghcr.io={address}", "--mirror-exposed", "no")
    assert problem.startswith("--mirror-for ghcr.io: ")
    assert problems("--mirror-listen", address, "--mirror-exposed", "perhaps")
    config = read("--mirror-listen", address, "--mirror-exposed", "yes")
    assert config.mirror_listen == parse_address(address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1"])
def test_a_mirror_on_loopback_needs_no_leave(address):
    assert read("--mirror-listen", address, "--mirror-for", f"a={address}").mirror_for


# Where other nodes reach this one.


@pytest.mark.parametrize(
    ("advertise", "listening", "advertised"),
    [
        (None, "10.0.0.1:29901", "10.0.0.1:29901"),
        (None, "127.0.0.1:29901", "127.0.0.1:29901"),
        (None, "node.example:1", "node.example:1"),
        (None, "0.0.0.0:29901", ""),
        (None, "[::]:29901", ""),
        (None, "10.0.0.1:0", ""),
        ("10.0.0.2:7", "0.0.0.0:29901", "10.0.0.2:7"),
        ("[fd00::1]:7", "10.0.0.1:29901", "[fd00::1]:7"),
    ],
)
def test_a_node_is_reached_where_it_says_or_else_where_it_listens(advertise, listening, advertised):
    config = read(*(["--advertise", advertise] if advertise else []))
    assert config.advertised(parse_address(listening)) == advertised


# Secrets.


def test_the_cluster_secret_is_stripped_and_shows_nowhere(secret_file):
    config = read("--cluster-secret-file", str(secret_file))
    assert config.cluster_secret == b"0123456789abcdef0123456789abcdef"
    assert "0123456789" not in repr(config)
    assert "0123456789" not in str(config)


def test_a_short_cluster_secret_is_refused_without_showing_it(secret_file):
    secret_file.write_text("  guessable-15-b   \n")
    (problem,) = problems("--cluster-secret-file", str(secret_file))
    assert "at least 16 bytes" in problem
    assert "guessable" not in problem


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("upstream", "r.example=https://user:hunter2@r.example"),
        ("upstream", "r.example=ftp://user:hunter2@r.example"),
        ("upstream", "r.example=https://hunter2@r.example/?a"),
        ("upstream", "r.example=https://user:hunter2@[::1"),
        ("upstream", "r.example=https://user:hunter2@r\u2100.example"),
        ("upstream", "https://user:hunter2@r.example"),
        ("upstream", "https://user:hunter2=x@r.example"),
        ("upstream", "https://user:x=hunter2@r.example"),
        ("mirror-for", "r.example=user:hunter2@127.0.0.1:1"),
        ("peer", "http://user:hunter2@10.0.0.1:1"),
    ],
)
def test_a_password_in_a_url_is_refused_without_showing_it(flag, value):
    (problem,) = problems(f"--{flag}", value)
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    "host", ["b\u00fccher.test", "x" * 64 + ".test", "a..test", ".", "a\tb.test"]
)
@pytest.mark.parametrize("flag", ["peer", "upstream"])
def test_a_url_whose_host_cannot_be_looked_up_is_refused(flag, host):
    url = f"http://{host}:29901"
    (problem,) = problems(f"--{flag}", url if flag == "peer" else f"r.example={url}")
    assert "ASCII" in problem


def test_a_url_is_spelled_in_ascii():
    (problem,) = problems("--peer", "http://a.test:1/b\u00fccher")
    assert "ASCII" in problem


# Sizes and addresses.


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1B", 1),
        ("500MB", 500_000_000),
        ("500 mb", 500_000_000),
        ("20GiB", 20 << 30),
        ("20Gi", 20 << 30),
        ("20G", 20_000_000_000),
        ("1.5TiB", 3 << 39),
        ("1k", 1000),
        ("0.001kb", 1),
        (" 7KiB ", 7168),
    ],
)
def test_a_size_is_read(text, size):
    assert parse_size(text) == size


@given(st.integers(1, 10**15 - 1))
def test_a_plain_number_is_its_own_size(number):
    assert parse_size(str(number)) == number


@given(st.text(max_size=12) | st.from_regex(r"\A[0-9.]{0,30} ?[KMGTkmgti\u0130\u0131]{0,2}[bB]?\Z"))
@example("9" * 400)
@example("9" * 5000)
@example("1G\N{LATIN SMALL LETTER DOTLESS I}")
@example("1\N{KELVIN SIGN}")
@example("5iB")
@example("0.1")
@example("٣")
@example("1e9")
@example("-1")
@example("1..5")
def test_any_size_is_positive_or_refused(text):
    try:
        assert parse_size(text) >= 1
    except ValueError:
        return
    assert text.isascii()
    assert any(character.isdigit() for character in text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("10MB/s", 10_000_000),
        ("10MB", 10_000_000),
        ("10 MiB/s", 10 << 20),
        ("10M", 10_000_000),
        ("1.5Gi/s", 3 << 29),
        ("100Mbit", 12_500_000),
        ("100mbit/s", 12_500_000),
        ("1Gibit", 1 << 27),
        ("1GBit/s", 125_000_000),
        ("1000000bit", 125_000),
        ("65536", 65536),
        (" 64KiB/s ", 65536),
        ("0", None),
        ("0Mbit", None),
        ("0.0MB/s", None),
    ],
)
def test_a_rate_is_read(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["", "MB/s", "10Mb/s", "10mbps", "10MB/h", "10MB/s/s", "-1", "1e9"]
)
def test_what_is_no_rate_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"10MB/s \(bytes\) or 100Mbit \(bits\)"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["1", "100", "100kbit", "63KiB/s", "0.9bit"])
def test_a_limit_so_low_that_nothing_would_work_is_a_mistake(text):
    with pytest.raises(ValueError, match=r"less than 64KiB/s"):
        parse_rate(text)


@given(
    st.text(max_size=12) | st.from_regex(r"\A[0-9.]{0,20} ?[KMGTkmgti\u212a]{0,2}(b|B|bit)?(/s)?\Z")
)
@example("9" * 5000)
@example("1\N{KELVIN SIGN}")
def test_any_rate_is_none_or_useful_or_refused(text):
    try:
        rate = parse_rate(text)
    except ValueError:
        return
    assert rate is None or rate >= 64 << 10
    assert text.isascii()


ADDRESSES = st.builds(
    Address,
    st.one_of(
        st.ip_addresses(v=4).map(str),
        st.ip_addresses(v=6).map(str),
        st.from_regex(r"\A([a-z0-9-]{1,9}\.){0,2}[a-z0-9]{1,9}\.?\Z"),
    ),
    st.integers(0, 65535),
)


@given(ADDRESSES)
@example(Address("fe80::1%eth0", 1))
def test_a_printed_address_is_read_back(address):
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        ":80",
        "a:",
        "a",
        "a:b",
        "a:-1",
        "a:+1",
        "a:65536",
        "a:٣",
        "a: 80",
        "a b:80",
        "a:" + "9" * 10_000,
        "::1:80",
        "[::1:80",
        "::1]:80",
        "[[::1]]:80",
        "[]:80",
        "[1]:80",
        "[127.0.0.1]:80",
        "[a.example]:80",
        "http://a:80",
        "a/b:80",
        "user@a:80",
        "b\u00fccher.test:80",
        "x" * 64 + ".test:80",
        "a..test:80",
    ],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match=r"HOST:PORT|At least 3 parts|Expected"):
        parse_address(text)


@given(st.text(max_size=20) | st.from_regex(r"\A[\[\]0-9a-f:.%]{0,20}:[0-9]{1,6}\Z"))
def test_any_address_is_read_or_refused(text):
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert 0 <= address.port <= 65535
    assert parse_address(str(address)) == address


# The process.


def test_the_environment_and_the_interpreter_are_those_of_this_process():
    assert process_environment()["PATH"]
    assert Path(interpreter()).exists()
