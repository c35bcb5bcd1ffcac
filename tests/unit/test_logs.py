"""How a line looks, for machines and for people."""

import json
import logging
import sys
from datetime import datetime

import pytest

from p2pcache.logs import set_up_logging


@pytest.fixture
def lines(capsys):
    """Set logging up in a format, log through it, and return what was written."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    asyncio_level = logging.getLogger("asyncio").level

    def log(log_format, level="info"):
        set_up_logging(log_format, level)
        return lambda: capsys.readouterr().err.removesuffix("\n").split("\n")

    yield log
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("asyncio").setLevel(asyncio_level)


logger = logging.getLogger("p2pcache.some.part")


def test_a_json_line_holds_the_event_and_its_fields(lines):
    written = lines("json")
    logger.warning("peer.blamed", extra={"peer": "peer 10.0.0.1:2", "blames": 3, "name_": None})
    (line,) = map(json.loads, written())
    moment = datetime.fromisoformat(line.pop("ts"))
    assert moment.utcoffset() is not None
    assert line == {
        "level": "warning",
        "logger": "p2pcache.some.part",
        "msg": "peer.blamed",
        "peer": "peer 10.0.0.1:2",
        "blames": 3,
        "name_": None,
    }


def test_a_json_line_is_one_line_whatever_the_fields_hold(lines):
    written = lines("json")
    logger.info("x", extra={"path": "a\nb\x1b[2J", "other": {1}, "ü": b"\n"})
    (line,) = map(json.loads, written())
    assert line["path"] == "a\nb\x1b[2J"
    assert line["other"] == "{1}"
    assert line["ü"] == "b'\\n'"


def test_a_text_line_is_for_people(lines):
    written = lines("text")
    logger.info("node.ready", extra={"store": "/var/lib/p2pcache", "known_peers": 2})
    (line,) = written()
    assert line[8] == "."
    assert line[12:] == " INFO    node.ready store=/var/lib/p2pcache known_peers=2"


def test_a_text_line_cannot_be_forged_by_what_it_quotes(lines):
    written = lines("text")
    logger.info("x", extra={"path": "/a\n00:00:00.000 INFO    node.ready", "b": "\x1b[2J", "c": ""})
    (line,) = written()
    assert line.endswith(" x path='/a\\n00:00:00.000 INFO    node.ready' b='\\x1b[2J' c=")


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_an_exception_is_told_with_its_traceback(lines, log_format):
    written = lines(log_format)
    try:
        raise ZeroDivisionError("by nothing")
    except ZeroDivisionError:
        logger.exception("bug")
    text = written()
    assert "ZeroDivisionError: by nothing" in "\n".join(text)
    assert (len(text) == 1) is (log_format == "json")
    if log_format == "json":
        assert json.loads(text[0])["exception"].startswith("Traceback")


def test_the_level_is_kept_and_the_event_loop_is_quiet(lines):
    written = lines("json", "warning")
    logger.info("not told")
    logger.warning("told")
    assert [json.loads(line)["msg"] for line in written()] == ["told"]
    set_up_logging("json", "debug")
    logger.debug("told as well")
    logging.getLogger("asyncio").debug("Using selector: EpollSelector")
    assert [json.loads(line)["msg"] for line in written()] == ["told as well"]


def test_only_one_handler_is_ever_there(lines):
    written = lines("text")
    set_up_logging("text", "info")
    logger.info("once")
    assert len(written()) == 1
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, logging.StreamHandler)
    assert handler.stream is sys.stderr
