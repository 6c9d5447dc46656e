"""Hands on what nodes write to their log files, line by line. One thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path


class LogFollower:
    """Reads the files by name; `lines` may be called again and again."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._offsets = dict.fromkeys(files, 0)

    def lines(self) -> Iterator[tuple[str, str]]:
        """(name, line) of every whole line that is new."""
        for name, path in self._files.items():
            try:
                with path.open("rb") as file:
                    file.seek(self._offsets[name])
                    data = file.read()
            except OSError:
                continue
            whole = data[: data.rfind(b"\n") + 1]
            self._offsets[name] += len(whole)
            for line in whole.decode("utf-8", "replace").splitlines():
                yield name, line
