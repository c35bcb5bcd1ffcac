import argparse
import io
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.errors import FormatError
from p2pcache.demo.nodes import parse_counters
from p2pcache.demo.report import NodeResult, Result, format_bytes, render_json, render_text
from p2pcache.demo.run import Progress, add_arguments
from p2pcache.metrics import Metrics


def node(i: int, mismatches: tuple[str, ...] = ()) -> NodeResult:
    return NodeResult(
        node=f"node-{i}",
        requests=40,
        requested_bytes=9_100_000,
        served_local=100_000,
        served_peer=9_000_000 if i > 1 else 0,
        served_upstream=0 if i > 1 else 9_000_000,
        fetched_peer=9_050_000 if i > 1 else 0,
        fetched_upstream=0 if i > 1 else 9_200_000,
        files=412,
        mismatches=mismatches,
        seconds=1.25,
    )


RESULT = Result(
    image="demo.registry/demo/python-app:v1",
    layers=2,
    image_bytes=17_300_000,
    image_files=3912,
    registry_delay_s=0.02,
    upstream_bytes=9_300_000,
    upstream_bytes_one_node=9_200_000,
    upstream_bytes_without_mirror=27_300_000,
    seconds_without_mirror=3.0,
    mismatches_without_mirror=(),
    nodes=(node(1), node(2), node(3)),
    seconds=7.5,
)


def test_the_document_has_the_promised_keys():
    document = json.loads(render_json(RESULT))
    del document["perNode"]
    assert document == {
        "nodes": 3,
        "imageBytes": 17_300_000,
        "requestedBytes": 27_300_000,
        "upstreamBytes": 9_300_000,
        "upstreamBytesOneNode": 9_200_000,
        "upstreamBytesWithoutMirror": 27_300_000,
        "peerBytes": 18_100_000,
        "mismatches": 0,
        "seconds": 7.5,
    }


def test_the_table_has_a_row_for_each_node_and_a_total():
    text = render_text(RESULT)
    for cells in (["node-2", "9.1 MB", "100 kB", "9.0 MB", "0 B", "1.25 s"], ["total", "27.3 MB"]):
        line = next(line for line in text.splitlines() if line.strip().startswith(cells[0]))
        assert all(cell in line for cell in cells)


def test_the_text_fits_a_terminal_of_100_columns():
    assert max(map(len, render_text(RESULT).splitlines())) < 100


def test_a_terminal_without_unicode_gets_ascii():
    assert render_text(RESULT, ascii_only=True).isascii()


def test_a_wrong_file_is_named():
    wrong = replace(RESULT, nodes=(node(1), node(2, mismatches=("lib/json/decoder.py",))))
    assert len(wrong.mismatches) == 1
    assert "node-2: lib/json/decoder.py" in render_text(wrong)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (17_300_000, "17.3 MB"),
        (5_000_000_000_000, "5000 GB"),
    ],
)
def test_bytes_are_told_in_three_digits(count, text):
    assert format_bytes(count) == text


def test_counters_are_read_off_the_page_that_a_node_serves():
    metrics = Metrics()
    metrics.served_bytes["peer"].inc(2e9)
    metrics.fetched_bytes["upstream"].inc(7)
    counters = parse_counters(metrics.render().decode())
    assert (counters.served_peer, counters.fetched_upstream) == (2_000_000_000, 7)
    assert (counters.served_local, counters.served_upstream, counters.fetched_peer) == (0, 0, 0)


LINES = st.sampled_from(
    [
        "# TYPE p2pcache_served_bytes_total counter",
        'p2pcache_served_bytes_total{source="local"} 1',
        'p2pcache_served_bytes_total{source="peer"} NaN',
        'p2pcache_served_bytes_total{source="upstream"} +Inf',
        'p2pcache_fetched_bytes_total{source="peer"} 1e400',
        'p2pcache_fetched_bytes_total{source="upstream"} 3',
        "p2pcache_served_bytes_total{",
        "} 1",
    ]
)


@given(st.lists(LINES, max_size=8).map("\n".join) | st.text(max_size=50))
def test_any_page_is_read_or_refused(page):
    with pytest.raises(FormatError):
        parse_counters(page)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_rewrites_one_line_and_leaves_none():
    stream = Terminal()
    progress = Progress(stream)
    progress.show("one")
    progress.show("two")
    progress.clear()
    progress.clear()
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().split("\r\x1b[2K") == ["", "  one ...", "  two ...", ""]


def test_progress_elsewhere_is_a_plain_line_each():
    stream = io.StringIO()
    progress = Progress(stream)
    progress.show("one")
    progress.clear()
    assert stream.getvalue() == "one\n"


@pytest.mark.parametrize(
    "flags",
    [["--nodes", "0"], ["--nodes", "33"], ["--nodes", "x"], ["--registry-delay", "nan"]],
)
def test_flags_that_make_no_sense_are_refused(flags):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    with pytest.raises(argparse.ArgumentError):
        parser.parse_args(flags)


def test_the_defaults_are_three_nodes_and_a_table():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([])
    assert (args.nodes, args.json) == (3, False)
