"""Holds answers to their grammars in a process beside the last stage: `python -m cluster.guide_process`.

The library makes its view of a vocabulary without a break of Python's lock, for a second and more where there
are 150,000 tokens: in the stage's own process the heartbeats would stop, and the ring would give the node up.
And for some grammars the library ends its process (cluster/api/grammar_checker.py). This one starts with the
first grammar; docs/http_api.md says what memory it takes.

In come lines of JSON, out go masks: an 8-byte number of the question, a 4-byte length, a kind, and the bytes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import numpy as np

from cluster.grammar import GrammarError
from cluster.guide import Guide, Guides, Mask

LIMIT_S = 60.0  # a question that takes longer ends the process, and with it the answers that need it
_HEAD = struct.Struct("<QI")
_MASK, _VOID, _ERROR = b"M", b"V", b"E"
_GONE = "the grammar library ended without an answer; simplify the grammar, or send the request again"


class GuideProcess:
    """As Guides, whose work is done elsewhere: nothing here waits but `allowed`. Compute thread only."""

    def __init__(self, model_dir: Path, vocab_size: int) -> None:
        self._command = [sys.executable, "-m", "cluster.guide_process", str(model_dir), str(vocab_size)]
        self._vocab_size = vocab_size
        self._child: _Child | None = None
        self._num_opened = 0

    def open(self, grammar: str) -> RemoteGuide:
        """A guide for one answer, compiled while the caller goes on. Raises GrammarError if none can be."""
        if self._child is None or self._child.is_gone.is_set():
            try:
                self._child = _Child(self._command)
            except OSError as error:
                raise GrammarError(f"no process can be started for grammars: {error}") from error
        self._num_opened += 1
        return RemoteGuide(self._child, self._num_opened, grammar, self._vocab_size)

    def prepare(self) -> bool:
        """Nothing is left to do here: see Guides."""
        return False

    def close(self) -> None:
        """The process ends; so it does when nothing refers to it any more."""
        if self._child is not None:
            self._child.close()
            self._child = None


class RemoteGuide:
    """As Guide: which tokens may follow in one answer. Compute thread only.

    ready: done once the grammar is compiled and the first mask is here, or the reason why not.
    """

    def __init__(self, child: _Child, number: int, grammar: str, vocab_size: int) -> None:
        self._child, self._number, self._vocab_size = child, number, vocab_size
        self._told: list[int] = []  # the answer that was asked about last
        child.tell({"open": number, "grammar": grammar})
        weakref.finalize(self, child.tell, {"close": number})
        self.ready = self._asked = self._ask([])

    def expect(self, answer: list[int]) -> None:
        """`answer` is what `allowed` will most likely be asked for next: its mask is made meanwhile."""
        self._asked = self._ask(answer)

    def allowed(self, answer: list[int]) -> Mask | None:
        """See Guide.allowed. Waits for the mask."""
        if answer != self._told:
            self._asked = self._ask(answer)
        kind, payload = self._asked.result()
        if kind == _ERROR:
            raise GrammarError(payload.decode())
        if kind == _VOID:
            return None
        bits = np.frombuffer(payload, dtype=np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def _ask(self, answer: list[int]) -> Future[tuple[bytes, bytes]]:
        num_same = len(self._told)
        if answer[:num_same] != self._told:
            num_same = next(i for i, t in enumerate(self._told) if i >= len(answer) or answer[i] != t)
        self._told = answer
        return self._child.ask({"guide": self._number, "same": num_same, "more": answer[num_same:]})


class _Child:
    """The process, with a thread that writes to it and one that reads. It ends with its standard input."""

    def __init__(self, command: list[str]) -> None:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # a terminal's Ctrl-C is the node's to answer
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self.is_gone = threading.Event()
        self._num_asked = 0
        self._pending: dict[int, Future[tuple[bytes, bytes]]] = {}
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        threading.Thread(
            target=_write, args=(process.stdin, self._lines), name="guide-writer", daemon=True
        ).start()
        threading.Thread(
            target=_read,
            args=(process, self._pending, self.is_gone),
            name="guide-reader",
            daemon=True,
        ).start()
        self.close = weakref.finalize(self, self._lines.put, None)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Any thread; never blocks."""
        self._lines.put(json.dumps(message).encode() + b"\n")

    def ask(self, message: Mapping[str, Any]) -> Future[tuple[bytes, bytes]]:
        """The kind and the bytes of its answer."""
        self._num_asked += 1
        future = self._pending[self._num_asked] = Future[tuple[bytes, bytes]]()
        self.tell({**message, "number": self._num_asked})
        if self.is_gone.is_set():
            _fail(self._pending)
        return future


def _write(stdin: IO[bytes], lines: SimpleQueue[bytes | None]) -> None:
    try:
        with stdin:
            while (line := lines.get()) is not None:
                stdin.write(line)
                stdin.flush()
    except OSError:  # it is gone, as the reader tells
        pass


def _read(
    process: subprocess.Popen[bytes],
    pending: dict[int, Future[tuple[bytes, bytes]]],
    is_gone: threading.Event,
) -> None:
    assert process.stdout is not None
    with process.stdout as stdout:
        while len(head := stdout.read(_HEAD.size)) == _HEAD.size:
            number, length = _HEAD.unpack(head)
            body = stdout.read(length)
            if len(body) < length:
                break
            pending.pop(number).set_result((body[:1], body[1:]))
    process.wait()
    is_gone.set()
    _fail(pending)


def _fail(pending: dict[int, Future[tuple[bytes, bytes]]]) -> None:
    with contextlib.suppress(KeyError):  # none is left
        while True:
            pending.popitem()[1].set_result((_ERROR, _GONE.encode()))


# -- the process itself --------------------------------------------------------------------------------------
class _Server:
    """Answers questions in order, but that a guide whose grammar is being compiled holds up no other."""

    def __init__(self, guides: Guides, out: IO[bytes]) -> None:
        self._guides, self._out = guides, out
        self._open: dict[int, Guide] = {}
        self._answers: dict[int, list[int]] = {}
        self._waiting: dict[int, list[dict[str, Any]]] = {}
        self.work: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def run(self) -> None:
        """For ever; the process ends with its input."""
        while True:
            if not self._waiting:
                faulthandler.cancel_dump_traceback_later()
            message = self.work.get()
            faulthandler.dump_traceback_later(LIMIT_S, exit=True)
            self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        if "open" in message:
            number = message["open"]
            guide = self._open[number] = self._guides.open(message["grammar"])
            self._answers[number], self._waiting[number] = [], []
            guide.compiled.add_done_callback(lambda _: self.work.put({"compiled": number}))
        elif "close" in message:
            for question in self._waiting.pop(message["close"], ()):
                self._send(question, _VOID)  # nobody reads it, but somebody may wait for it
            self._open.pop(message["close"], None)
            self._answers.pop(message["close"], None)
        elif "compiled" in message:
            for question in self._waiting.pop(message["compiled"], ()):
                self._answer(question)
        elif message["guide"] in self._waiting:
            self._waiting[message["guide"]].append(message)
        else:
            self._answer(message)

    def _answer(self, question: dict[str, Any]) -> None:
        answer = self._answers[question["guide"]]
        del answer[question["same"] :]
        answer += question["more"]
        try:
            mask = self._open[question["guide"]].allowed(list(answer))
            body = _VOID if mask is None else _MASK + np.packbits(mask, bitorder="little").tobytes()
        except ValueError as error:  # GrammarError, TokenizerError
            body = _ERROR + str(error).encode()
        self._send(question, body)

    def _send(self, question: dict[str, Any], body: bytes) -> None:
        self._out.write(_HEAD.pack(question["number"], len(body)) + body)
        self._out.flush()


def main() -> None:
    """Serves the folder and vocabulary size of the command line."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no mask
    server = _Server(Guides(Path(sys.argv[1]), int(sys.argv[2])), out)

    def read() -> None:
        for line in sys.stdin.buffer:
            server.work.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, name="stdin", daemon=True).start()
    server.run()


if __name__ == "__main__":
    main()
