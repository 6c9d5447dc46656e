"""`macrame bench`: what a running ring does for 1..N users, measured through its HTTP endpoint.

Every user asks for an answer of a fixed length (ignore_eos) to a random prompt of token ids. Threads of this
process are the users; nothing here touches MLX or gRPC.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE, UserError

REQUEST_TIMEOUT_S = 600.0
FRESH_LIMIT_S = 10.0  # for two statuses of every node; they come several times a second
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Answer:
    """One user's answer. Times in s since the request was sent."""

    num_prompt: int
    num_tokens: int
    first_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Hop:
    """One way between neighbours, half of a measured round trip."""

    p50: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Run:
    """One line of the bench: `concurrency` users at once."""

    concurrency: int
    decode_tok_s: float  # of one user: tokens after the first over the time after the first; median
    prefill_tok_s: float  # prompt tokens over the time to the first token; median
    ttft_s: float  # median
    aggregate_tok_s: float  # all users' tokens over wall time
    hop_ms: Hop
    stage_ms: list[float]  # median compute time of a frame, in ring order
    stage_busy: list[float]  # share of the wall time that the compute thread worked, in ring order
    cpu_ms_per_token: float  # of all processes of the ring, per generated token
    acceptance: float | None  # of drafted tokens; null: no speculation


class Endpoint:
    """The ring's HTTP address, with its key."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url} is not an HTTP address; write it as http://host:port", EXIT_ERROR)
        self._is_tls = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.url = url

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=REQUEST_TIMEOUT_S)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any
    ) -> http.client.HTTPResponse:
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers)
            response = connection.getresponse()
        except OSError as error:
            raise UserError(
                f"{self.url} does not answer ({error}); is the ring running?", EXIT_UNREACHABLE
            ) from error
        if response.status != 200:
            text = response.read().decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                text = json.loads(text)["error"]["message"]
            raise UserError(f"{self.url}{path} answers {response.status}: {text[:300]}", EXIT_ERROR)
        return response

    def get(self, path: str) -> Any:
        """The JSON at `path`; raises UserError."""
        connection = self._connect()
        try:
            return json.loads(self._send(connection, "GET", path, None).read())
        finally:
            connection.close()

    def complete(self, prompt: Sequence[int], num_tokens: int) -> Answer:
        """Streams one completion of exactly `num_tokens`."""
        body = {
            "prompt": list(prompt),
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        connection = self._connect()
        started, first_s, count = time.perf_counter(), 0.0, 0
        try:
            for event in _events(self._send(connection, "POST", "/v1/completions", body)):
                if "error" in event:
                    raise UserError(f"the ring failed: {event['error'].get('message')}", EXIT_ERROR)
                for choice in event.get("choices", ()):
                    new = len(choice.get("token_ids") or ())
                    if new and not count:
                        first_s = time.perf_counter() - started
                    count += new
        finally:
            connection.close()
        if count != num_tokens:
            raise UserError(f"asked for {num_tokens} tokens and got {count}", EXIT_ERROR)
        return Answer(len(prompt), count, first_s, time.perf_counter() - started)


def _events(response: http.client.HTTPResponse) -> Iterable[Any]:
    for line in response:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[6:])


def measure(
    endpoint: Endpoint,
    concurrencies: Sequence[int],
    *,
    prompt_tokens: int,
    answer_tokens: int,
    cpu_s: Callable[[], float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The object that `macrame bench --json` prints.

    `cpu_s()` is the CPU time of all the ring's processes so far; without it, of its nodes as they report it.
    """
    cluster = endpoint.get("/v1/cluster")
    if cluster.get("plan") is None:
        raise UserError(
            f"the ring at {endpoint.url} has no plan yet: {cluster.get('reason')}", EXIT_UNREACHABLE
        )
    context = cluster["plan"]["context"]
    if prompt_tokens + answer_tokens > context:
        raise UserError(
            f"a prompt of {prompt_tokens} and an answer of {answer_tokens} tokens exceed the plan's context "
            f"of {context}; ask for less",
            EXIT_ERROR,
        )
    cpu = cpu_s or (lambda: sum(node["node"]["cpu_s"] for node in endpoint.get("/v1/cluster")["nodes"]))
    draw = random.Random(seed)
    vocabulary = max(2, cluster["vocab_size"] or 256)

    def prompt() -> list[int]:
        return [draw.randrange(1, vocabulary) for _ in range(prompt_tokens)]

    endpoint.complete(prompt(), min(8, answer_tokens))  # warm
    runs = [_run(endpoint, [prompt() for _ in range(users)], answer_tokens, cpu) for users in concurrencies]
    return {"runs": [asdict(run) for run in runs], "nodes": _nodes(endpoint.get("/v1/cluster"))}


def _run(
    endpoint: Endpoint, prompts: Sequence[list[int]], answer_tokens: int, cpu: Callable[[], float]
) -> Run:
    before, cpu_before, started = _fresh_stages(endpoint), cpu(), time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as users:
        answers = list(users.map(lambda p: endpoint.complete(p, answer_tokens), prompts))
    wall_s = time.perf_counter() - started
    after, cpu_used_s = _fresh_stages(endpoint), cpu() - cpu_before
    hops = sorted(ms for stats in after for ms in stats["recent_hop_ms"])
    return Run(
        concurrency=len(prompts),
        decode_tok_s=statistics.median(
            (a.num_tokens - 1) / (a.total_s - a.first_s) if a.num_tokens > 1 else 0.0 for a in answers
        ),
        prefill_tok_s=statistics.median(a.num_prompt / a.first_s for a in answers),
        ttft_s=statistics.median(a.first_s for a in answers),
        aggregate_tok_s=sum(a.num_tokens for a in answers) / wall_s,
        hop_ms=Hop(_quantile(hops, 0.5), _quantile(hops, 0.99)),
        stage_ms=[statistics.median(s["recent_step_ms"] or [0.0]) for s in after],
        stage_busy=[
            (b["busy_ms"] - a["busy_ms"]) / (wall_s * 1e3) for a, b in zip(before, after, strict=True)
        ],
        cpu_ms_per_token=cpu_used_s * 1e3 / sum(a.num_tokens for a in answers),
        acceptance=None,
    )


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def _stages(endpoint: Endpoint) -> list[dict[str, Any]]:
    """Each stage's statistics, in ring order."""
    cluster = endpoint.get("/v1/cluster")
    by_rank = {node["rank"]: node["node"] for node in cluster["nodes"]}
    return [by_rank[stage["rank"]]["stats"] for stage in cluster["plan"]["assignments"]]


def _fresh_stages(endpoint: Endpoint) -> list[dict[str, Any]]:
    """The same, measured after this call: the second new status of a node cannot be older."""
    stages = [_stages(endpoint)]
    deadline = time.monotonic() + FRESH_LIMIT_S
    while any(len({s[i]["uptime_ms"] for s in stages}) < 3 for i in range(len(stages[0]))):
        if time.monotonic() > deadline:
            raise UserError(
                f"the nodes sent no status for {FRESH_LIMIT_S:.0f} s; see macrame status", EXIT_ERROR
            )
        time.sleep(POLL_S)
        stages.append(_stages(endpoint))
    return stages[-1]


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


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        "users  decode tok/s  prefill tok/s   TTFT s  aggregate tok/s  hop p50 ms  CPU ms/token  stage busy"
    ]
    for run in result["runs"]:
        hop = "-" if run["hop_ms"]["p50"] is None else f"{run['hop_ms']['p50']:.3f}"
        busy = " ".join(f"{share:.0%}" for share in run["stage_busy"])
        lines.append(
            f"{run['concurrency']:5d}  {run['decode_tok_s']:12.1f}  {run['prefill_tok_s']:13.1f}"
            f"  {run['ttft_s']:7.3f}  {run['aggregate_tok_s']:15.1f}  {hop:>10}"
            f"  {run['cpu_ms_per_token']:12.2f}  {busy}"
        )
    lines.append("")
    lines.append("rank  weights GB  in use GB  saved GB  peak RSS GB")
    lines.extend(
        f"{node['rank']:4d}  {node['weight_bytes'] / 1e9:10.3f}  {node['actual_memory_usage_gb']:9.3f}"
        f"  {node['memory_saved_gb']:8.3f}  {node['peak_rss_bytes'] / 1e9:11.3f}"
        for node in result["nodes"]
    )
    return "\n".join(lines)
