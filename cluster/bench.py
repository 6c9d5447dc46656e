"""`macrame bench`: what a running ring does for 1..N users, measured through its HTTP endpoint.

Every user asks for answers of a fixed length (ignore_eos). Threads of this process are the users; nothing
here touches MLX or gRPC.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from cluster.bench_client import Answer, Endpoint
from cluster.bench_figures import Run, figures
from cluster.bench_users import ask
from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE, UserError
from cluster.length import check_length

FRESH_LIMIT_S = 10.0  # for two statuses of every node; they come several times a second
POLL_S = 0.05
WARM_UP_TOKENS = 16  # at most, of an answer that is not measured


@dataclass(frozen=True, slots=True)
class Load:
    """What the users of each run ask for."""

    concurrencies: tuple[int, ...]  # users at once, a run for each
    prompt_tokens: int
    output_tokens: int
    num_requests: int = 1  # of each user, one after another
    num_warm_up: int = 1  # of each user before those, not measured


class Bench:
    """One load on one ring. `runs` has what is measured so far, however `measure` ends.

    `prompts` gives a new prompt of the load's length each time. `cpu_s()` is the CPU time of all the ring's
    processes so far; without it, of its nodes as they report it. `show(what, detail)` says what is going on.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        load: Load,
        *,
        prompts: Iterator[list[int]],
        cpu_s: Callable[[], float] | None = None,
        show: Callable[[str, str], None] = lambda what, detail: None,
    ) -> None:
        self._endpoint, self._load, self._prompts, self._show = endpoint, load, prompts, show
        self._cpu_s = cpu_s or self._told_cpu_s
        self.cluster = planned(endpoint)  # /v1/cluster, as seen last
        self.runs: list[Run] = []
        context = self.cluster["plan"]["context"]
        check_length(load.prompt_tokens, load.output_tokens, context, "the plan")

    def measure(self) -> None:
        """Fills `runs`. Raises UserError, and KeyboardInterrupt once what came before it is in `runs`."""
        for users in self._load.concurrencies:
            self._run(users)

    def result(self) -> dict[str, Any]:
        """The object that `macrame bench --json` prints."""
        load = self._load
        return {
            "model": self.cluster.get("model"),
            "prompt_tokens": load.prompt_tokens,
            "output_tokens": load.output_tokens,
            "requests_per_user": load.num_requests,
            "warm_up_per_user": load.num_warm_up,
            "max_active": self.cluster["max_active"],
            "stages": _stages(self.cluster),
            "runs": [asdict(run) for run in self.runs],
            "nodes": _nodes(self.cluster),
        }

    def _run(self, users: int) -> None:
        who, load = "1 user" if users == 1 else f"{users} users", self._load
        if load.num_warm_up:
            self._show(f"{who}: warming up", "")
            warm = [list(islice(self._prompts, load.num_warm_up)) for _ in range(users)]
            ask(self._endpoint, warm, min(WARM_UP_TOKENS, load.output_tokens), [])
        prompts = [list(islice(self._prompts, load.num_requests)) for _ in range(users)]
        answers: list[Answer] = []

        def show() -> None:
            whole, tokens = sum(a.is_whole for a in answers), sum(a.num_tokens for a in answers)
            self._show(
                f"{who}: measuring {users * load.num_requests} answers", f"{whole} done, {tokens} tokens"
            )

        before, cpu_before_s = self._fresh(), self._cpu_s()
        show()
        try:
            ask(self._endpoint, prompts, load.output_tokens, answers, show)
        except KeyboardInterrupt:
            with contextlib.suppress(UserError, ValueError):  # a ring that is gone, or no token came
                self._add(users, answers, before, cpu_before_s, is_whole=False)
            raise
        self._add(users, answers, before, cpu_before_s, is_whole=True)

    def _add(
        self,
        users: int,
        answers: Sequence[Answer],
        before: list[dict[str, Any]],
        cpu_before_s: float,
        *,
        is_whole: bool,
    ) -> None:
        epoch, guessed, after = self.cluster["epoch"], self._guessed, self._fresh()
        if self.cluster["epoch"] != epoch:
            raise UserError(
                "the ring was set up anew while it was measured, so its stages' figures are lost; see "
                "macrame status, and measure again",
                EXIT_ERROR,
            )
        cpu_s = self._cpu_s() - cpu_before_s
        guesses = (self._guessed[0] - guessed[0], self._guessed[1] - guessed[1])
        self.runs.append(
            figures(users, answers, before, after, cpu_s=cpu_s, is_whole=is_whole, guesses=guesses)
        )

    @property
    def _guessed(self) -> tuple[int, int]:
        """Tokens guessed until the cluster was seen last, and how many of them were right."""
        return int(self.cluster.get("num_guessed", 0)), int(self.cluster.get("num_guessed_right", 0))

    def _fresh(self) -> list[dict[str, Any]]:
        """Each stage's statistics in ring order, measured after this call.

        The second new status of a node cannot be older. Raises UserError.
        """
        seen: dict[int, set[float]] = {}  # by rank
        deadline = time.monotonic() + FRESH_LIMIT_S
        while True:
            self.cluster = planned(self._endpoint)
            stats = _stats(self.cluster)
            for rank, stage in stats.items():
                seen.setdefault(rank, set()).add(stage["uptime_ms"])
            if all(len(seen[rank]) >= 3 for rank in stats):
                return list(stats.values())
            if time.monotonic() > deadline:
                raise UserError(
                    f"the nodes sent no status for {FRESH_LIMIT_S:.0f} s; see macrame status", EXIT_ERROR
                )
            time.sleep(POLL_S)

    def _told_cpu_s(self) -> float:
        return float(sum(node["node"]["cpu_s"] for node in planned(self._endpoint)["nodes"]))


def planned(endpoint: Endpoint) -> dict[str, Any]:
    """/v1/cluster of a ring that has a plan. Raises UserError for one without."""
    cluster = endpoint.get("/v1/cluster")
    if not isinstance(cluster, dict) or "nodes" not in cluster:
        raise UserError(f"{endpoint.url}/v1/cluster is not macrame's API; give the head's with --url")
    if cluster.get("plan") is None:
        raise UserError(
            f"the ring at {endpoint.url} has no plan yet: {cluster.get('reason')}", EXIT_UNREACHABLE
        )
    return cluster


def _stages(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """Who owns what, in ring order."""
    keys = ("rank", "node", "start", "stop")
    return [{key: stage[key] for key in keys} for stage in cluster["plan"]["assignments"]]


def _stats(cluster: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Each stage's statistics by rank, in ring order."""
    by_rank = {node["rank"]: node["node"]["stats"] for node in cluster["nodes"]}
    return {stage["rank"]: by_rank[stage["rank"]] for stage in cluster["plan"]["assignments"]}


def _nodes(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for node in cluster["nodes"]:
        status = node["node"]
        part = status["footprint"]
        own = sum(part[f"{name}_bytes"] for name in ("layers", "embed", "norm", "head", "other"))
        found.append(
            {
                "rank": node["rank"],
                "actual_memory_usage_gb": status["active_bytes"] / 1e9,
                "memory_saved_gb": (part["full_model_bytes"] - own) / 1e9,
                "peak_rss_bytes": status["peak_rss_bytes"],
                "weight_bytes": own,
            }
        )
    return found
