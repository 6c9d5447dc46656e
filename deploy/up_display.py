"""How `macrame up` shows itself: a live table on a terminal, lines elsewhere, JSON lines for programs.

Main thread only. People read standard error, programs standard output.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.console import say
from deploy.up_board import Event
from deploy.up_follow import Seen
from deploy.up_rows import BAD, GOOD, Row, headline

BAR_WIDTH = 12
BAD_EVENTS = ("died", "given_up", "away", "left")


class Display(Protocol):
    """Takes what is news, and what is."""

    def draw(self, rows: Sequence[Row], seen: Seen) -> None:
        """What is now; called several times a second."""

    def tell(self, event: Event) -> None:
        """What just happened."""

    def close(self) -> None:
        """Leaves the terminal as it should be."""


def display_for(*, is_json: bool) -> Display:
    """By where the output goes."""
    if is_json:
        return JsonLines(sys.stdout)
    return LiveTable(sys.stderr) if sys.stderr.isatty() else Lines(sys.stderr)


def early_display(*, is_json: bool) -> Display:
    """For what is told before `ssh` may ask questions on the terminal."""
    return JsonLines(sys.stdout) if is_json else Lines(sys.stderr)


class LiveTable:
    """A table that is drawn anew; what happened stands above it. A closed terminal takes nothing more,
    which is no error: the nodes are to be stopped all the same.
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)
        self._live.start()

    def draw(self, rows: Sequence[Row], seen: Seen) -> None:
        """See Display."""
        with contextlib.suppress(OSError, ValueError):
            self._live.update(_picture(rows, seen), refresh=True)

    def tell(self, event: Event) -> None:
        """See Display."""
        style = BAD if event.kind in BAD_EVENTS else ("bold" if event.kind == "ready" else "")
        with contextlib.suppress(OSError, ValueError):
            self._console.print(Text(event.text, style=style))

    def close(self) -> None:
        """See Display."""
        with contextlib.suppress(OSError, ValueError):
            self._live.stop()


def _picture(rows: Sequence[Row], seen: Seen) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("rank", "node", "where", "state", "layers", "tok/s", "memory", "to the next"):
        table.add_column(title, justify="right" if title in ("rank", "tok/s") else "left", overflow="fold")
    for row in rows:
        restarts = f" (restart {row.num_restarts})" if row.num_restarts else ""
        state: RenderableType = Text(f"{row.state}{restarts}", style=row.style)
        if row.done is not None:
            state = _bar(row)
        values = (row.layers, row.tok_s, row.memory, row.link)
        table.add_row(str(row.rank), Text(row.name), Text(row.where), state, *map(Text, values))
    notes = [Text(f"{row.name}: {row.note}", style=row.style) for row in rows if row.note]
    if all(row.is_over for row in rows):
        return Group(Text(""), table, *notes)
    line = Text(headline(seen), style=GOOD if seen.status == "ok" else "yellow")
    return Group(Text(""), table, *notes, line, Text("Ctrl-C stops all nodes.", style="dim"))


def _bar(row: Row) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=1.0, completed=row.done or 0.0, width=BAR_WIDTH)
    grid.add_row(Text(row.state, style=row.style), bar, Text(f"{row.done or 0.0:.0%}"))
    return grid


class Lines:
    """One line for each change."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._told: dict[int, str] = {}
        self._status = ""

    def draw(self, rows: Sequence[Row], seen: Seen) -> None:
        """See Display."""
        for row in rows:
            if self._told.get(row.rank) != row.told:
                self._told[row.rank] = row.told
                say(f"{row.name}: {row.told}", self._stream)
        status = f"{seen.status}: {seen.reason}" if seen.reason else seen.status
        if seen.cluster is not None and self._status != status:
            self._status = status
            say(f"ring: {status}", self._stream)

    def tell(self, event: Event) -> None:
        """See Display."""
        say(event.text, self._stream)

    def close(self) -> None:
        """See Display."""


class JsonLines:
    """One object for each change: `event` says which kind, docs/up.md has them all."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._told: dict[int, str] = {}
        self._status = ("", "")

    def draw(self, rows: Sequence[Row], seen: Seen) -> None:
        """See Display."""
        for row in rows:
            if self._told.get(row.rank) != row.told:
                self._told[row.rank] = row.told
                self._say(
                    {
                        "event": "state",
                        "rank": row.rank,
                        "name": row.name,
                        "where": row.where,
                        "state": row.state,
                        "reason": row.note,
                        "loaded": row.done,
                        "restarts": row.num_restarts,
                    }
                )
        if seen.cluster is not None and self._status != (seen.status, seen.reason):
            self._status = (seen.status, seen.reason)
            self._say({"event": "ring", "status": seen.status, "reason": seen.reason})

    def tell(self, event: Event) -> None:
        """See Display."""
        rank = {} if event.rank is None else {"rank": event.rank}
        self._say({"event": event.kind, **rank, "text": event.text, **(event.details or {})})

    def close(self) -> None:
        """See Display."""

    def _say(self, content: dict[str, Any]) -> None:
        say(json.dumps(content), self._stream)
