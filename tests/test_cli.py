"""The umbrella command, its client, and what `status` and `generate` print."""

from __future__ import annotations

import importlib
import io
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.api.status import to_plain
from cluster.errors import UserError
from deploy import cli
from deploy.answer import Timing, stream_answer
from deploy.client import Client
from deploy.demo.run import CONFIG
from deploy.generate import usual_length
from deploy.state_line import StateLine
from deploy.status import render
from planner.sizes import size
from proto import control_pb2, head_pb2


@contextmanager
def server(status: int, body: bytes, seen: list[Any] | None = None) -> Iterator[Client]:
    """An HTTP server that answers everything but /v1/models alike."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("content-length", 0))
            if seen is not None:
                content = json.loads(self.rfile.read(length)) if length else None
                seen.append((self.path, self.headers.get("authorization"), content))
            is_models = self.path == "/v1/models"
            self.send_response(200 if is_models else status)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "m"}]}' if is_models else body)

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield Client("127.0.0.1", httpd.server_port)
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def events(*contents: Any, is_done: bool = True) -> bytes:
    lines = [b"data: " + json.dumps(content).encode() + b"\n\n" for content in contents]
    return b"".join(lines) + (b"data: [DONE]\n\n" if is_done else b"")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def closed_port() -> int:
    with server(200, b"") as client:
        return client.port


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_main_and_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(cli.COMMANDS[command][0])
    assert callable(module.main)
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "macrame: which command?"),
        (["pln"], "macrame: argument COMMAND: invalid choice: 'pln'"),
        (["generate"], "macrame generate: there is no prompt: give one, or pipe one in"),
        (
            ["generate", "x", "--max-tokens", "few"],
            "macrame generate: argument --max-tokens: invalid int value",
        ),
        (["bench"], "macrame bench: one of the arguments --config --url is required"),
        (
            ["bench", "--url", "http://x", "--concurrency", "1,0"],
            "macrame bench: argument --concurrency: '0' must",
        ),
        (["status", "--url", "ftp://x"], "macrame status: --url ftp://x is not of the form http://"),
        (
            ["status", "--url", "http://x:abc"],
            "macrame status: --url http://x:abc is not of the form http://",
        ),
        (["status", "--config", "nowhere.json"], "macrame status: nowhere.json"),
        (["node", "--rank", "0"], "run_node: the following arguments are required: --config"),
        (["plan"], "plan-dry-run: the following arguments are required: --config"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_3(arguments: Sequence[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 3
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_ctrl_c_while_a_command_is_imported_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "impatient.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "impatient", ("impatient", ""))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
    try:
        assert cli.main(["impatient"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", "")


def test_the_version_and_a_light_start() -> None:
    loaded = "print({'mlx', 'grpc'} & set(sys.modules))"
    code = f"import sys; from deploy import cli; cli.main(['--version']); {loaded}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"macrame \d+\.\d+\.\d+\nset\(\)\n", result.stdout)


def test_plan_passes_arguments_and_exit_code_on(tmp_path: Path) -> None:
    assert run("plan", "--config", str(CONFIG)).returncode == 0
    missing = run("plan", "--config", str(tmp_path / "none.json"))
    assert missing.returncode == 3


def test_nobody_there_is_exit_code_4() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    for arguments in (["status"], ["generate", "hello"]):
        result = run(*arguments, "--url", url)
        assert result.returncode == 4
        assert result.stderr == (
            f"macrame {arguments[0]}: {url} does not answer (Connection refused); is the ring running?\n"
        )


@pytest.mark.parametrize(("context", "length"), [(100, 50), (512, 256), (100_000, 256), (None, 256)])
def test_an_answer_of_unsaid_length_fits_a_small_context(context: int | None, length: int) -> None:
    told = {"status": "ok", "nodes": []} | ({} if context is None else {"context": context})
    with server(200, json.dumps(told).encode()) as client:
        assert usual_length(client) == length


def test_an_answer_is_streamed_and_timed() -> None:
    text = {"finish_reason": None}
    body = events(
        {"choices": [{"text": "a", **text}]},
        {"choices": [{"text": "b", "finish_reason": "length"}]},
        {"choices": [], "usage": {"completion_tokens": 7}},
    )
    written: list[str] = []
    seen: list[Any] = []
    with server(200, body, seen) as open_client:
        client = Client(open_client.host, open_client.port, key="secret")
        timing = stream_answer(client, {"prompt": "p", "max_tokens": 7}, written.append)
    assert written == ["a", "b"]
    assert timing.num_tokens == 7
    assert 0 < timing.first_s <= timing.total_s
    path, key, sent = seen[-1]
    assert (path, key) == ("/v1/completions", "Bearer secret")
    assert sent == {
        "model": "m",
        "prompt": "p",
        "max_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_chat_goes_to_the_chat_endpoint() -> None:
    body = events({"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]})
    seen: list[Any] = []
    written: list[str] = []
    with server(200, body, seen) as client:
        stream_answer(client, {"messages": [{"role": "user", "content": "x"}]}, written.append)
    assert seen[-1][0] == "/v1/chat/completions"
    assert written == ["hi"]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, events({"error": {"message": "node 2 is gone"}}), "the answer broke off: node 2 is gone"),
        (200, events({"choices": []}, is_done=False), "closed the stream before the end of the answer"),
        (429, b'{"error": {"message": "the queue is full"}}', "answers 429: the queue is full"),
        (500, b"<html>", "answers 500: it is not macrame's API"),
    ],
)
def test_a_failed_answer_is_one_sentence(status: int, body: bytes, message: str) -> None:
    with server(status, body) as client, pytest.raises(UserError, match=re.escape(message)):
        stream_answer(client, {"prompt": "p"}, lambda text: None)


def test_timing_counts_tokens_after_the_first() -> None:
    assert Timing(11, 0.5, 2.5).tok_s == 5.0
    assert Timing(1, 0.5, 0.5).tok_s == 0.0
    assert Timing(4, 0.5, 0.5001).tok_s == 0.0, "pieces that came together say nothing of speed"
    assert str(Timing(11, 0.5, 2.5)) == "11 tokens, 5.0 tokens/s, first token after 500 ms"


def cluster_body(state: str) -> dict[str, Any]:
    told = control_pb2.NodeStatus(start=2, stop=5, kv_bytes=3_000_000)
    told.footprint.layers_bytes, told.footprint.head_bytes = 1_000_000, 500_000
    told.stats.recent_hop_ms.extend([0.3, 0.1, 0.2])
    told.memory_pressure = "normal"
    told.memory.total_bytes, told.memory.available_bytes = 16 * 10**9, 4 * 10**9
    told.memory.peak_kv_bytes, told.memory.memory_limit_bytes = 3_500_000, 12 * 10**9
    status = head_pb2.ClusterStatus(context=512, max_active=4, num_active=1)
    status.ranks.add(
        rank=1, name="mini", state=state, reason="" if state == "ready" else "mini is gone", node=told
    )
    status.ranks[0].predicted.weights.layers_bytes = 1_000_000
    status.ranks[0].predicted.kv_bytes = 4_000_000
    content = to_plain(status)
    nodes = content.pop("ranks")
    is_ok = state == "ready"
    return content | {
        "model": "demo",
        "status": "ok" if is_ok else "degraded",
        "reason": "" if is_ok else "a node is gone",
        "plan": {},
        "nodes": nodes,
    }


def test_status_shows_each_node() -> None:
    lines = render(cluster_body("ready")).splitlines()
    assert lines[0] == "demo: ok"
    assert next(line for line in lines if "ready" in line).split() == [
        *("1", "mini", "ready", "2:5", "1.5", "MB", "3.0", "MB", "0", "B"),
        *("4.0", "GB", "of", "16.0", "GB", "normal", "0.20", "ms"),
    ]


def test_status_warns_of_a_certificate_near_its_end() -> None:
    body = cluster_body("ready")
    body["nodes"][0]["node"]["certificate_warning"] = (
        "mini.pem expires on 2030-01-01, in 5 days: make new ones"
    )
    assert render(body).splitlines()[1] == (
        "WARNING: rank 1 (mini): mini.pem expires on 2030-01-01, in 5 days: make new ones"
    )


def test_status_shows_predicted_beside_measured_memory() -> None:
    *_, predicted, measured, limits = render(cluster_body("ready")).splitlines()
    assert predicted.split()[:5] == ["1", "mini", "predicted", "1.0", "MB"]
    assert "4.0 MB" in predicted
    assert measured.split()[:5] == ["measured", "1.0", "MB", "0", "B"]
    assert "3.5 MB" in measured
    assert limits.startswith("rank 1 (mini): MLX may take 12.0 GB, keep 0 B of freed buffers")


@pytest.mark.parametrize(("state", "code"), [("ready", 0), ("unreachable", 4), ("frozen", 4), ("failed", 1)])
def test_status_exit_codes(state: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    body = cluster_body(state)
    with server(200, json.dumps(body).encode()) as client:
        assert cli.main(["status", "--url", client.url]) == code
        shown = capsys.readouterr().out
        assert cli.main(["status", "--url", client.url, "--json"]) == code
    assert ("mini is gone" in shown) == (code != 0)
    assert json.loads(capsys.readouterr().out) == body


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (123_400, "123 kB"),
        (4_510_000, "4.5 MB"),
        (2 * 10**9, "2.0 GB"),
    ],
)
def test_sizes_are_decimal(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


def test_the_state_line_prints_each_change_once_off_a_terminal() -> None:
    stream = io.StringIO()
    line = StateLine(stream)
    for text in ("starting", "starting", "loading", "loading"):
        line.show(text)
    line.end("Ready.")
    assert re.fullmatch(r"starting\nloading\nReady after 0\.\d s\.\n", stream.getvalue())


def test_the_state_line_is_rewritten_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    line = StateLine(stream)
    line.show("starting: a longer text")
    line.show("loading")
    line.end("Ready.")
    assert stream.getvalue().count("\r") == 3
    assert stream.getvalue().count("\n") == 1
    widths = {len(part) for part in stream.getvalue().rstrip("\n").split("\r")[1:]}
    assert len(widths) == 1, "a shorter text covers the longer one"
