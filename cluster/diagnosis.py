"""What `macrame doctor` says of one machine, and what its checks look at: values. Any thread.

Each check is a function of a Subject that returns findings. It says `fine` only for what it looked at, and
`skipped`, with the reason, for what it could not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

from cluster import macos

if TYPE_CHECKING:  # nothing of ours that needs planner or proto: they may be what is wrong
    from cluster.config import ClusterConfig, NodeConfig
    from cluster.tls import Credentials

Status = Literal["error", "warning", "fine", "skipped"]
STATUSES = ("error", "warning", "fine", "skipped")
MAX_CHARS = 2000  # that are kept of what another node says


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. error: the ring cannot work, or is open to others; warning: it works worse, or not for long;
    fine: looked at; skipped: not looked at, and `what` is the reason.
    """

    check: str
    status: Status
    what: str
    why: str = ""
    mend: str = ""  # the command that mends it, or what to do

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status = {self.status!r} is none of {', '.join(STATUSES)}")
        if self.is_wrong and not (self.why and self.mend):
            raise ValueError(f"the finding {self.what!r} does not say why it matters, or what mends it")

    @property
    def is_wrong(self) -> bool:
        return self.status in ("error", "warning")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at: a machine, and the part that it has in a cluster.

    ranks: the config's used nodes on this machine. running: the rank of the node that looks at itself; None
    for a command.
    """

    config: ClusterConfig | None = None
    ranks: tuple[int, ...] = ()
    running: int | None = None
    credentials: Credentials | None = None  # None: they cannot be used
    why_no_config: str = "needs --config"
    platform: str = sys.platform
    output: Callable[[list[str]], str | None] = field(default=macos.output)  # None: the command failed

    @property
    def is_mac(self) -> bool:
        return self.platform == "darwin"

    @property
    def nodes(self) -> tuple[NodeConfig, ...]:
        """The config's used nodes on this machine."""
        return () if self.config is None else tuple(self.config.nodes[rank] for rank in self.ranks)

    @property
    def others(self) -> tuple[NodeConfig, ...]:
        """The config's other used nodes."""
        if self.config is None:
            return ()
        return tuple(n for n in self.config.nodes if n.use and n.rank not in self.ranks)

    @property
    def why_no_nodes(self) -> str:
        """Why there is nothing to say of this machine's nodes, or an empty string."""
        if self.config is None:
            return self.why_no_config
        return "" if self.ranks else f"no node of {self.config.path} is on this machine"


Check = Callable[[Subject], Iterable[Finding]]


def fine(check: str, what: str) -> Finding:
    """It was looked at, and nothing is wrong."""
    return Finding(check, "fine", what)


def skipped(check: str, reason: str) -> Finding:
    """It was not looked at."""
    return Finding(check, "skipped", reason)


def received(check: str, status: str, what: str, why: str, mend: str) -> Finding:
    """A finding that another node sent. Raises ValueError for what is none."""
    texts = (_plain(text[:MAX_CHARS]) for text in (what, why, mend))
    return Finding(_plain(check[:40]), cast(Status, status), *texts)


def _plain(text: str) -> str:
    """Without what could move a terminal's cursor."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)
