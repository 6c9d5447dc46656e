"""The log of one process: places, levels, rotation, and that no place can hold up who logs."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import log_writer
from cluster.errors import UserError
from cluster.log_book import LogBook
from cluster.log_line import LogLine, to_wire
from cluster.log_writer import LogWriter, RotatingFile
from cluster.logs import UNSAID, LogChoices, Logs, current_request, relay, said
from cluster.recent_lines import MAX_PER_STATUS, NUM_KEPT, RecentLines
from proto import control_pb2
from tests.waiting import wait_for

logger = logging.getLogger("cluster.tested")


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    """The loggers as they were."""
    names = (None, "cluster", "deploy", "kernels", "planner", "shard_loader")
    before = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def line(message: str = "m", level: str = "info") -> LogLine:
    return LogLine(1.0, level, "s", message)


def messages(recent: RecentLines) -> list[str]:
    status = control_pb2.NodeStatus()
    recent.fill(status, 0)
    return [one.message for one in status.logs]


def test_a_terminal_shows_states_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs(LogChoices(), 1)
    logs.begin()
    logger.info("quiet")
    logger.info("ok", extra=said("[n1] "))
    logger.warning("loud")
    logger.error("told by another", extra=UNSAID)
    logging.getLogger("library").info("never")
    logs.end()
    logger.warning("after the end")
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "[n1] ok"
    assert shown[1].endswith("WARNING cluster.tested: loud")
    assert len(shown) == 2
    assert messages(logs.recent) == ["quiet", "ok", "loud", "told by another"]


def test_verbose_shows_more(capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs(LogChoices(is_verbose=True), 1)
    logs.begin()
    logger.info("quiet")
    logs.end()
    assert capsys.readouterr().err.endswith("INFO cluster.tested: quiet\n")


def test_json_on_standard_error_has_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs(LogChoices("json"), 1)
    logs.node = "mini1"
    logs.begin()
    token = current_request.set("req-9")
    logger.info("ok", extra=said("[n1] ") | {"fields": {"status": 200}})
    current_request.reset(token)
    logger.error("told by another", extra=UNSAID)
    logs.end()
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["message"], first["request_id"], first["status"]) == ("ok", "req-9", 200)
    assert (second["node"], second["rank"], second["request_id"]) == ("mini1", 1, None)


def test_a_file_has_every_line_beside_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "node.log"
    logs = Logs(LogChoices(file=path), 0)
    logs.begin()
    logger.info("one")
    logger.info("two", extra=said("[n0] "))
    logs.end()
    lines = path.read_text().splitlines()
    assert [one.split(" ", 1)[1] for one in lines] == [
        "INFO rank 0 cluster.tested - one",
        "INFO rank 0 cluster.tested - two",
    ]
    assert capsys.readouterr().err == "[n0] two\n"


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "node.log"
    with pytest.raises(UserError) as caught:
        Logs(LogChoices(file=path), 0)
    assert str(caught.value) == (
        f"the log file {path} cannot be written: No such file or directory; give --log-file another path"
    )
    assert caught.value.exit_code == 3


def test_a_file_is_rotated_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "MAX_FILE_BYTES", 100)
    monkeypatch.setattr(log_writer, "NUM_OLD_FILES", 2)
    write = RotatingFile(tmp_path / "log", lambda line: line.message)
    for number in range(20):
        write(line(f"{number:02d} " + "x" * 40))
    write.close()
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["log", "log.1", "log.2"]
    assert all(path.stat().st_size <= 100 for path in tmp_path.iterdir())
    assert (tmp_path / "log").read_text().startswith("18 ")


def test_a_full_disk_is_told_once_and_lines_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    is_full = threading.Event()
    is_full.set()
    written: list[LogLine] = []

    def write(one: LogLine) -> None:
        if is_full.is_set():
            raise OSError(28, "No space left on device")
        written.append(one)

    writer = LogWriter(write, name="a.log")
    for _ in range(3):
        writer(line())
    wait_for(lambda: writer._num_lost == 3)
    is_full.clear()
    writer(line("after"))
    writer.close(5.0)
    assert [one.message for one in written] == ["3 lines before this one were lost", "after"]
    assert capsys.readouterr().err == (
        "the log cannot be written to a.log ([Errno 28] No space left on device); "
        "lines are lost until it can\n"
    )


def test_a_full_pipe_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "MAX_WAITING", 10)
    may_write, began = threading.Event(), threading.Event()
    written: list[str] = []

    def write(one: LogLine) -> None:
        began.set()
        assert may_write.wait(10.0)
        written.append(one.message)

    writer = LogWriter(write, name="a pipe")
    writer(line("first"))
    assert began.wait(5.0)
    for number in range(40):
        writer(line(str(number)))  # returns at once, forty times
    writer.close(0.05)  # and so does this, though the writer is stuck
    may_write.set()
    wait_for(lambda: written[-1:] == ["9"])
    assert written == ["first", "30 lines before this one were lost", *map(str, range(10))]
    writer.close(5.0)


def test_lines_of_the_http_process_are_logged_as_ours(capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs(LogChoices(), 0)
    logs.begin()
    relay(" " + to_wire(LogLine(5.0, "info", "cluster.api.access", "GET /", "r1", {"status": 200})))
    relay(" not a line")
    logs.end()
    status = control_pb2.NodeStatus()
    assert logs.recent.fill(status, 0) == 1
    (told,) = status.logs
    assert (told.source, told.request_id, told.time_s) == ("cluster.api.access", "r1", 5.0)
    assert capsys.readouterr().err == ""


# -- to the head --------------------------------------------------------------------------------------------


def test_a_status_brings_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    recent = RecentLines()
    recent.add(line("a"))
    recent.add(line("hidden", "debug"))
    recent.add(line("b"))
    status = control_pb2.NodeStatus()
    assert recent.fill(status, 0) == 2
    assert [(one.number, one.message) for one in status.logs] == [(1, "a"), (2, "b")]
    again = control_pb2.NodeStatus()
    assert recent.fill(again, 2) == 2
    assert not again.logs


def test_many_lines_go_with_several_statuses_and_the_oldest_are_lost() -> None:
    recent = RecentLines()
    for number in range(1, NUM_KEPT + 51):
        recent.add(line(f"{number}"))
    sent, got = 0, []
    for _ in range(10):
        status = control_pb2.NodeStatus()
        sent = recent.fill(status, sent)
        assert len(status.logs) <= MAX_PER_STATUS
        got += [one.message for one in status.logs]
    assert got == [str(number) for number in range(51, NUM_KEPT + 51)]


def test_long_lines_are_cut_for_the_head() -> None:
    recent = RecentLines()
    recent.add(line("x" * 5000))
    assert [len(message) for message in messages(recent)] == [2000]


def told(book: LogBook, rank: int, count: int = 0) -> list[str]:
    (one,) = book.tell(rank, count)
    return [kept.message for kept in one.lines]


def lines(*messages: str, first: int = 1) -> list[control_pb2.LogLine]:
    return [control_pb2.LogLine(number=n, level="info", message=m) for n, m in enumerate(messages, first)]


def test_the_book_keeps_each_line_once_whatever_comes_twice() -> None:
    book = LogBook({0: "a", 2: "b"})
    book.take(2, 7, lines("one", "two"))
    book.take(2, 7, lines("one", "two", "three"))  # another stream, which begins anew
    assert told(book, 2) == ["one", "two", "three"]
    assert told(book, 2, 2) == ["two", "three"]
    book.take(2, 8, lines("restarted"))
    assert told(book, 2) == ["one", "two", "three", "restarted"]
    assert [(one.rank, one.name, len(one.lines)) for one in book.tell(None, 0)] == [(0, "a", 0), (2, "b", 4)]
    with pytest.raises(KeyError):
        book.tell(1, 0)


def test_the_book_is_bounded_and_checks_what_came_over_the_wire() -> None:
    book = LogBook({0: "a"})
    book.take(0, 1, lines(*(str(n) for n in range(300))))
    assert len(told(book, 0)) == NUM_KEPT
    bad = control_pb2.LogLine(
        number=301, level="<b>", message="x" * 9000, request_id="a\nb", source="s" * 999
    )
    book.take(0, 1, [bad])
    kept = book.tell(0, 1)[0].lines[0]
    assert (kept.level, kept.request_id) == ("info", "")
    assert (len(kept.message), len(kept.source)) == (2000, 100)


def test_the_progress_of_a_load_does_not_push_out_the_rest() -> None:
    recent, book = RecentLines(), LogBook({0: "a"})
    recent.add(line("before"))
    for done in range(1000):
        recent.add(line(f"loading: n0 is loading ({done / 100:.2f} of 9.99 GB)"))
    assert messages(recent) == ["before", "loading: n0 is loading (9.99 of 9.99 GB)"]
    book.take(0, 1, lines("loading (0.10 of 1.00 GB)", "loading (0.20 of 1.00 GB)"))
    assert told(book, 0) == ["loading (0.20 of 1.00 GB)"]
