"""One line of the log: what it holds, how it is written, what never gets into it."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest

from cluster.log_line import (
    MAX_MESSAGE_CHARS,
    LogLine,
    as_json,
    as_plain,
    as_text,
    checked_id,
    cut,
    is_progress,
    line_of,
    record_from,
    to_wire,
)

LINE = LogLine(1795263636.7672, "warning", "cluster.node", "an edge is gone", "req-1", {"status": 503})


def record(message: str, *args: object, **values: Any) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"name": "cluster.x", "levelno": logging.INFO, "msg": message, "args": args, **values}
    )


def test_as_text_it_is_one_line_that_grep_and_awk_can_read() -> None:
    assert as_text(LINE, "mini1") == (
        "2026-11-21T12:20:36.767Z WARNING mini1 cluster.node req-1 an edge is gone"
    )
    assert as_text(LogLine(0.0, "info", "cluster.x", "one\ntwo"), "n") == (
        "1970-01-01T00:00:00.000Z INFO n cluster.x - one\n    two"
    )


def test_as_json_it_is_one_object_with_the_messages_own_values() -> None:
    text = as_json(LINE, "mini1", 2)
    assert "\n" not in text
    assert json.loads(text) == {
        "time": "2026-11-21T12:20:36.767Z",
        "level": "warning",
        "rank": 2,
        "node": "mini1",
        "source": "cluster.node",
        "request_id": "req-1",
        "message": "an edge is gone",
        "status": 503,
    }
    assert json.loads(as_json(LogLine(0.0, "info", "s", 'two\n"lines"'), "n", 0))["message"] == 'two\n"lines"'


def test_people_see_what_is_said_without_time_and_level() -> None:
    assert as_plain(LogLine(0.0, "info", "s", "ok", said="[n0] ")) == "[n0] ok"
    assert as_plain(LINE).endswith(" WARNING cluster.node: [req-1] an edge is gone")


def test_a_message_cannot_look_like_another_line() -> None:
    line = line_of(record("path %s", "/a\r\x1b[31m\x85\n2026 ERROR"), request_id="", hides_errors=False)
    assert line.message == "path /a\\x0d\\x1b[31m\\x85\n2026 ERROR"
    assert as_text(line, "n").splitlines()[1] == "    2026 ERROR"


def test_a_message_whose_arguments_do_not_fit_is_logged_as_it_is() -> None:
    assert line_of(record("%d left", "no"), request_id="", hides_errors=False).message == "%d left"


@pytest.mark.parametrize("text", ["req-1", "0c6e", "a.b_c:d/e+f=", "x" * 128])
def test_request_ids(text: str) -> None:
    assert checked_id(text) == text


@pytest.mark.parametrize("text", ["", "x" * 129, "two words", "a\n", "-a", "ä", 'a"', "a\x00"])
def test_what_is_no_request_id(text: str) -> None:
    assert checked_id(text) == ""
    line = line_of(record("m", request_id=text), request_id="", hides_errors=False)
    assert line.request_id == ""


def raised() -> Any:
    try:
        try:
            raise KeyError("secret-1")
        except KeyError as error:
            raise ValueError("secret-2") from error
    except ValueError:
        return sys.exc_info()


def test_a_traceback_is_part_of_the_message() -> None:
    line = line_of(record("failed", exc_info=raised()), request_id="", hides_errors=False)
    assert line.message.startswith("failed\nTraceback (most recent call last):\n")
    assert line.message.endswith("ValueError: secret-2")
    assert "secret-1" in line.message


def test_where_requests_are_read_a_traceback_quotes_none() -> None:
    line = line_of(record("failed", exc_info=raised()), request_id="", hides_errors=True)
    assert line.message.count("(not logged)") == 2
    assert "KeyError: (not logged)" in line.message
    assert "in raised" in line.message
    assert "'secret-1'" not in line.message
    assert ": secret-2" not in line.message


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    line = line_of(record("a" * 9000 + "z"), request_id="", hides_errors=False)
    assert len(line.message) == MAX_MESSAGE_CHARS
    assert line.message.endswith("az")
    assert cut("abcdefghijklmnopqrstuvwxyz", 20) == "abcde [...] stuvwxyz"
    assert cut("short", 20) == "short"


def test_a_line_crosses_to_another_process_whole() -> None:
    text = to_wire(LINE)
    again = line_of(record_from(text), request_id="other", hides_errors=False)
    assert again == LINE
    shown = LogLine(1.0, "info", "s", "50 % of\nit", said="[n0] ")
    assert line_of(record_from(to_wire(shown)), request_id="", hides_errors=False) == shown


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"source": "s", "level": "loud"}'])
def test_what_is_no_line_of_another_process(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        record_from(text)


def test_the_progress_of_a_load_is_one_line() -> None:
    assert is_progress("loading: n1 is loading (0.10 of 2.00 GB)", "loading: n1 is loading (1.10 of 2.00 GB)")
    assert is_progress("n1 is loading (0.10 of 9.99 MB)", "n1 is loading (9.99 of 9.99 MB)")
    assert not is_progress("loading: n1 (0.10 of 2.00 GB)", "loading: n2 is loading (1.10 of 2.00 GB)")
    assert not is_progress("epoch 1: ready", "epoch 2: ready")
