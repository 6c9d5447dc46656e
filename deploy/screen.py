"""Where an answer is shown: thoughts are dim, and no byte of it steers the terminal. One thread."""

from __future__ import annotations

from typing import TextIO

from cluster.console import look_of, show_anything

DIM, RED, PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[0m"
_CONTROLS = dict.fromkeys((*range(32), *range(0x7F, 0xA0)), "\N{REPLACEMENT CHARACTER}")
_HARMLESS = {code: sign for code, sign in _CONTROLS.items() if chr(code) not in "\n\t"}


class Screen:
    """Writes to `stream`; what is no terminal gets the text as it is, and no thoughts."""

    def __init__(self, stream: TextIO, *, shows_thoughts: bool = True) -> None:
        show_anything(stream)
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._has_color = look_of(stream).is_color
        self._shows_thoughts = shows_thoughts and self._is_terminal
        self._is_dim = False
        self._is_at_start = True

    def text(self, text: str) -> None:
        """A piece of an answer."""
        if self._is_dim:
            self._dim(False)
            text = f"\n\n{text}"
        self._write(text)

    def thought(self, text: str) -> None:
        """A piece of the reasoning before it."""
        if not self._shows_thoughts or not text:
            return
        if not self._is_dim:
            self._dim(True)
        self._write(text)

    def note(self, text: str) -> None:
        """A line of the program's own, dim."""
        self.end()
        self._line(text, DIM)

    def trouble(self, text: str) -> None:
        """A line that says what went wrong."""
        self.end()
        self._line(text, RED)

    def end(self) -> None:
        """The answer is over: the next thing begins on a line of its own."""
        self._dim(False)
        if not self._is_at_start:
            self._write("\n")
        self._stream.flush()

    def _line(self, text: str, color: str) -> None:
        shown = text.translate(_HARMLESS) if self._is_terminal else text
        print(f"{color}{shown}{PLAIN}" if self._has_color else shown, file=self._stream, flush=True)

    def _dim(self, is_dim: bool) -> None:
        if is_dim != self._is_dim and self._has_color:
            self._stream.write(DIM if is_dim else PLAIN)
        self._is_dim = is_dim

    def _write(self, text: str) -> None:
        if text:
            self._stream.write(text.translate(_HARMLESS) if self._is_terminal else text)
            self._stream.flush()
            self._is_at_start = text.endswith("\n")
