"""What `macrame doctor` prints: findings of several machines put together, as text and as JSON. Pure."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.diagnosis import Finding

HERE = "this machine"
WIDTH = 112  # of lines of text; commands are never broken
_ORDER = {"error": 0, "warning": 1, "fine": 2, "skipped": 3}


@dataclass(frozen=True, slots=True)
class Told:
    """A finding and who told it; nobody: it is of the ring as a whole."""

    finding: Finding
    where: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything, the worst first. nodes: for --all, what each node is, for JSON and one line each."""

    told: tuple[Told, ...]
    nodes: Sequence[dict[str, Any]] = field(default_factory=tuple)

    @property
    def num_wrong(self) -> int:
        return sum(told.finding.is_wrong for told in self.told)

    def of(self, *statuses: str) -> list[Told]:
        """Those of a status."""
        return [told for told in self.told if told.finding.status in statuses]


def gather(said: Iterable[tuple[str, Iterable[Finding]]]) -> tuple[Told, ...]:
    """The same finding of several machines once, with all their names; the worst first, else as they came."""
    places: dict[Finding, list[str]] = {}
    for name, findings in said:
        for finding in findings:
            there = places.setdefault(finding, [])
            if name and name not in there:
                there.append(name)
    told = [Told(finding, tuple(names)) for finding, names in places.items()]
    return tuple(sorted(told, key=lambda one: _ORDER[one.finding.status]))


def as_json(report: Report) -> str:
    """One object."""
    wrong = [
        {
            "severity": told.finding.status,
            "check": told.finding.check,
            "where": list(told.where),
            "what": told.finding.what,
            "why": told.finding.why,
            "mend": told.finding.mend,
        }
        for told in report.of("error", "warning")
    ]
    good = [
        {"check": told.finding.check, "where": list(told.where), "what": told.finding.what}
        for told in report.of("fine")
    ]
    left = [
        {"check": told.finding.check, "where": list(told.where), "reason": told.finding.what}
        for told in report.of("skipped")
    ]
    found = {"ok": not wrong, "findings": wrong, "fine": good, "not_checked": left}
    return json.dumps({**found, "nodes": list(report.nodes)}, indent=2)


def as_text(report: Report, *, is_counted: bool = True) -> str:
    """Findings with why and mend, then what is fine and what was not checked, a line each, then a count."""
    lines: list[str] = []
    for told in report.of("error", "warning"):
        lines += [*_wrong(told), ""]
    if report.nodes:
        lines += [*map(_node, report.nodes), ""]
    for title, status in (("fine:", "fine"), ("not checked:", "skipped")):
        rows = report.of(status)
        if rows:
            lines += [title, *_rows(rows), ""]
    if is_counted:
        lines.append(_count(report))
    return "\n".join(lines).rstrip()


def _wrong(told: Told) -> list[str]:
    finding = told.finding
    where = f" on {', '.join(told.where)}" if told.where and told.where != (HERE,) else ""
    word = "" if finding.check == "sentence" else f"{finding.status.upper()} {finding.check}{where}: "
    why = textwrap.wrap(finding.why, WIDTH, initial_indent="  why:  ", subsequent_indent="        ")
    what = textwrap.wrap(f"{word}{finding.what}", WIDTH, subsequent_indent="  ")
    return [*what, *why, f"  mend: {finding.mend}"]


def _node(node: dict[str, Any]) -> str:
    if not node["answers"]:
        return f"{node['name']} at {node['address']}: no answer"
    clock = node["clock_offset_s"]
    versions = f"macrame {node['macrame']}, mlx {node['mlx']}, mlx-lm {node['mlx_lm']}"
    told = f"{node['name']} at {node['address']}: {versions}"
    if clock is None:
        return told
    return f"{told}, Python {node['python']}, clock {clock:+.3f} s (+-{node['clock_uncertainty_s']:.3f})"


def _rows(rows: Sequence[Told]) -> list[str]:
    """A paragraph for each check."""
    told_of: dict[str, list[str]] = {}
    for told in rows:
        where = "" if not told.where or told.where == (HERE,) else f" ({', '.join(told.where)})"
        told_of.setdefault(told.finding.check, []).append(f"{told.finding.what}{where}")
    width = max(map(len, told_of))
    lines: list[str] = []
    for check, texts in told_of.items():
        begin = f"  {check.ljust(width)}  "
        lines += textwrap.wrap(
            "; ".join(texts),
            WIDTH,
            initial_indent=begin,
            subsequent_indent=" " * len(begin),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _count(report: Report) -> str:
    parts = []
    for status, word in (("error", "error"), ("warning", "warning")):
        number = len(report.of(status))
        if number:
            parts.append(f"{number} {word}{'s' if number > 1 else ''}")
    found = " and ".join(parts) or "nothing wrong was found"
    return f"{found}; {len(report.of('fine'))} fine, {len(report.of('skipped'))} not checked"
