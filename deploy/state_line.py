"""One line that says what is going on: rewritten in place on a terminal, once per change elsewhere."""

from __future__ import annotations

import shutil
import time
from typing import TextIO


class StateLine:
    """Shows states on `stream` until `end`. One thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._begin = time.monotonic()
        self._shown = ""

    def show(self, text: str) -> None:
        """Say what is going on now; the same text again costs nothing off a terminal."""
        if self._is_terminal:
            self._rewrite(f"{text} ({time.monotonic() - self._begin:.0f} s)")
        elif text != self._shown:
            print(text, file=self._stream, flush=True)
        self._shown = text

    def end(self, text: str) -> None:
        """The last word, with the time it took."""
        text = f"{text[:-1]} after {time.monotonic() - self._begin:.1f} s."
        if self._is_terminal:
            self._rewrite(text)
        print("" if self._is_terminal else text, file=self._stream, flush=True)

    def _rewrite(self, text: str) -> None:
        width = max(20, shutil.get_terminal_size().columns - 1)
        self._stream.write(f"\r{text[:width]:<{width}}")
        self._stream.flush()
