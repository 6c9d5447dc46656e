"""What the answers of several nodes mean beside each other: versions, configs, models, clocks. Pure."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.config import ClusterConfig, NodeConfig
from cluster.console import as_word
from cluster.diagnosis import Finding, fine, skipped
from cluster.diagnosis_clock import SET_LINUX, SET_MAC
from cluster.diagnosis_clock import WHY as WHY_CLOCK
from cluster.diagnosis_links import WHY_WIFI
from cluster.diagnosis_reach import why_not
from cluster.diagnosis_software import REINSTALL
from planner.sizes import gb
from proto import control_pb2, head_pb2

CLOCK_LIMIT_S = 1.0
CLOCK_ERROR_S = 3600.0  # a new certificate begins so long before it was made
WHY_AWAY = "without it the ring does not serve, or runs without its memory"


@dataclass(frozen=True, slots=True)
class Clock:
    """Another clock minus ours, right to +- uncertainty_s."""

    offset_s: float
    uncertainty_s: float


@dataclass(frozen=True, slots=True)
class NodeAnswer:
    """What came of asking one node: a reply; or the profile of an older macrame; or why it did not answer."""

    node: NodeConfig
    reply: control_pb2.DiagnoseReply | None = None
    clock: Clock | None = None
    findings: list[Finding] = field(default_factory=list)
    older: control_pb2.NodeProfile | None = None
    error: OSError | None = None  # of connecting
    trouble: str = ""

    @property
    def told(self) -> control_pb2.DiagnoseReply | control_pb2.NodeProfile | None:
        """Whatever has its versions and digest."""
        return self.reply or self.older

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = self.told
        python = self.reply.python_version if self.reply is not None else None
        return {
            "rank": self.node.rank,
            "name": self.node.name,
            "address": self.node.address,
            "answers": told is not None,
            "macrame": told.macrame_version if told else None,
            "mlx": told.mlx_version if told else None,
            "mlx_lm": told.mlx_lm_version if told else None,
            "python": python,
            "platform": told.platform if told else None,
            "config_digest": told.config_digest if told else None,
            "model_digest": self.reply.model_digest if self.reply else None,
            "clock_offset_s": self.clock.offset_s if self.clock else None,
            "clock_uncertainty_s": self.clock.uncertainty_s if self.clock else None,
        }


def compare_nodes(config: ClusterConfig, answers: Sequence[NodeAnswer]) -> list[Finding]:
    """Who did not answer, and in what the others differ."""
    found = [finding for answer in answers for finding in _absent(config, answer)]
    there = [answer for answer in answers if answer.told is not None]
    if not there:
        return [*found, skipped("nodes", "no node answered, so none was compared with another")]
    found += [*_versions(there), *_configs(config, there), *_models(there), *_clocks(there)]
    return found


def _absent(config: ClusterConfig, answer: NodeAnswer) -> Iterable[Finding]:
    node = answer.node
    start = f"run_node --rank {node.rank} --config {as_word(config.path)}    # on {node.host}"
    if answer.older is not None:
        version = answer.older.macrame_version
        yield Finding(
            "nodes",
            "error",
            f"{node.name} runs macrame {version}, which cannot look at itself for others",
            "what is wrong there was not looked at, and nodes of different versions are not tested together",
            f"{REINSTALL}; then {start}",
        )
    elif isinstance(answer.error, ConnectionRefusedError):
        what = f"{node.name} does not answer: nobody listens at {node.address}"
        yield Finding("nodes", "error", what, WHY_AWAY, start)
    elif answer.error is not None:
        yield why_not(node, answer.error, is_mac=sys.platform == "darwin")
    elif answer.trouble:
        yield Finding(
            "nodes",
            "error",
            f"{node.name} does not answer: {answer.trouble.partition('; ')[0]}",
            WHY_AWAY,
            _mend_trouble(answer.trouble, config) or start,
        )


def _mend_trouble(trouble: str, config: ClusterConfig) -> str:
    """For a sentence of cluster/call_trouble.py or cluster/tls_trouble.py; empty: starting it helps."""
    if "in time" in trouble:
        return (
            "ps -eo pid,stat,args | grep run_node    # there: T is stopped (kill -CONT its pid), D waits for "
            "its disk; else stop it and start it again"
        )
    if "another token" in trouble:
        return "scp -p TOKEN_FILE HOST:TOKEN_FILE    # the ring's token file to the side that has another"
    if "certificate" in trouble or "TLS" in trouble:
        show = f"macrame certs show --config {as_word(config.path)}"
        return f"{show}    # where the CA is: {trouble.rpartition(': ')[2]}"
    return ""


def _versions(answers: Sequence[NodeAnswer]) -> Iterable[Finding]:
    kinds = (
        ("macrame", "error", "different versions are not tested together, and may refuse each other"),
        ("mlx-lm", "error", "layers of one model are computed by different code: answers may be wrong"),
        ("mlx", "warning", "kernels differ between versions: tokens may differ from one machine's"),
        ("Python", "warning", "packages may come in other versions for another Python"),
    )
    for name, status, why in kinds:
        found = {answer.node.name: _version(answer, name) for answer in answers}
        known = {node: version for node, version in found.items() if version}
        if len(set(known.values())) > 1:
            mend = "uv python pin 3.12    # the same everywhere, then " if name == "Python" else ""
            most = Counter(known.values()).most_common(1)[0][0]
            odd = ", ".join(node for node, version in known.items() if version != most)
            yield Finding(
                "versions",
                "error" if status == "error" else "warning",
                f"{name} differs: {', '.join(f'{version} on {node}' for node, version in known.items())}",
                why,
                f"{mend}{REINSTALL}; on {odd}, or on all",
            )
        elif len(known) > 1:
            yield fine("versions", f"{name} {next(iter(known.values()))} on all {len(known)}")


def _version(answer: NodeAnswer, name: str) -> str:
    told = answer.told
    assert told is not None
    if name == "Python":  # 3.12.1 and 3.12.7 take the same packages
        return ".".join(answer.reply.python_version.split(".")[:2]) if answer.reply is not None else ""
    values = {"macrame": told.macrame_version, "mlx": told.mlx_version, "mlx-lm": told.mlx_lm_version}
    return values[name]


def _configs(config: ClusterConfig, answers: Sequence[NodeAnswer]) -> Iterable[Finding]:
    other = {
        answer.node.name: answer.told.config_digest
        for answer in answers
        if answer.told is not None and answer.told.config_digest != config.digest
    }
    if not other:
        yield fine("config", f"digest {config.digest} on all {len(answers)}, as this file's")
        return
    names = ", ".join(f"{name} ({digest})" for name, digest in other.items())
    first = next(answer.node for answer in answers if answer.node.name in other)
    yield Finding(
        "config",
        "error",
        f"{names} {'run' if len(other) > 1 else 'runs'} with another config than {config.path} "
        f"({config.digest})",
        "nodes whose configs differ refuse each other; the file was changed here or there since they started",
        f"scp {as_word(config.path)} {first.host}:    # to each of them, in the right place; then stop and "
        "start run_node",
    )


def _models(answers: Sequence[NodeAnswer]) -> Iterable[Finding]:
    replies = {answer.node.name: answer.reply for answer in answers if answer.reply is not None}
    found = {name: reply.model_digest for name, reply in replies.items() if reply.model_digest}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{digest} on {name}" for name, digest in found.items())
        yield Finding(
            "model",
            "error",
            f"the model's files differ: digest {listed}",
            "a layer of another model gives nonsense, so nodes refuse the head's plan",
            "rsync -a --checksum MODEL_FOLDER/ HOST:MODEL_FOLDER/    # from the right one; or name a hub id",
        )
    elif len(found) > 1:
        digest = next(iter(found.values()))
        yield fine("model", f"config and headers are the same on all {len(found)} (digest {digest})")


def _clocks(answers: Sequence[NodeAnswer]) -> Iterable[Finding]:
    """Each clock against the one in the middle, this machine's among them."""
    clocks = {answer.node.name: answer.clock for answer in answers if answer.clock is not None}
    if not clocks:
        yield skipped("clock", "no node told its clock")
        return
    middle_s = statistics.median_low([0.0, *(clock.offset_s for clock in clocks.values())])
    is_wrong = False
    for answer in answers:
        clock = answer.clock
        if clock is None or abs(clock.offset_s - middle_s) <= CLOCK_LIMIT_S + clock.uncertainty_s:
            continue
        is_wrong = True
        off_s = clock.offset_s - middle_s
        is_mac = answer.reply is not None and answer.reply.platform.startswith("macOS")
        yield Finding(
            "clock",
            "error" if abs(off_s) > CLOCK_ERROR_S else "warning",
            f"the clock of {answer.node.name} is {abs(off_s):.1f} s "
            f"{'ahead of' if off_s > 0 else 'behind'} the "
            f"others' (+-{clock.uncertainty_s:.3f} s)",
            WHY_CLOCK,
            f"{SET_MAC if is_mac else SET_LINUX}    # on {answer.node.host}",
        )
    if abs(middle_s) > CLOCK_LIMIT_S:
        is_wrong = True
        yield Finding(
            "clock",
            "warning",
            f"this machine's clock is {abs(middle_s):.1f} s "
            f"{'behind' if middle_s > 0 else 'ahead of'} the nodes'",
            WHY_CLOCK,
            f"{SET_LINUX}    # here; on a Mac: {SET_MAC}",
        )
    if not is_wrong:
        worst_s = max(abs(clock.offset_s - middle_s) for clock in clocks.values())
        slowest_s = max(clock.uncertainty_s for clock in clocks.values())
        yield fine("clock", f"all within {worst_s:.3f} s of each other's middle (+-{slowest_s:.3f} s)")


def ring_findings(config: ClusterConfig, status: head_pb2.ClusterStatus | None) -> list[Finding]:
    """What the head says of the whole."""
    if status is None:
        return [skipped("ring", "the head does not tell the state of the ring")]
    found = list(_edges(config, status))
    if status.status == "ok":
        return [fine("ring", f"it serves, in epoch {status.epoch}"), *found]
    found.append(
        Finding(
            "ring",
            "warning" if status.status == "loading" else "error",
            f"the ring does not serve ({status.status}): {status.reason or 'no reason given'}",
            "every request is refused with 503 until it does",
            "macrame status --watch    # after what is said above of its nodes was mended",
        )
    )
    return found


def _edges(config: ClusterConfig, status: head_pb2.ClusterStatus) -> Iterable[Finding]:
    """The interfaces that the ring's edges really use."""
    kinds: Counter[str] = Counter()
    names = {rank.rank: rank.name for rank in status.ranks}
    for rank in status.ranks:
        for edge in rank.node.edges:
            if not edge.is_up:
                continue
            kinds[edge.kind or "unknown"] += 1
            if edge.kind == "wifi":
                yield Finding(
                    "links",
                    "warning",
                    f"{rank.name} sends to {names.get(edge.to_rank, edge.to_rank)} by Wi-Fi "
                    f"({edge.interface or 'unknown interface'}, {edge.address})",
                    WHY_WIFI,
                    f"macrame links --config {as_word(config.path)}    # shows every way and what it costs; "
                    "connect both by "
                    "cable",
                )
    if kinds and "wifi" not in kinds:
        yield fine("links", f"edges in use: {', '.join(f'{n} by {kind}' for kind, n in kinds.items())}")
    short = [r for r in status.ranks if r.HasField("node") and r.node.memory_pressure not in ("", "normal")]
    for rank in short:
        memory = rank.node.memory
        yield Finding(
            "memory",
            "warning",
            f"{rank.name} is short of memory ({rank.node.memory_pressure}): {gb(memory.available_bytes)} of "
            f"{gb(memory.total_bytes)} are available",
            "it gives up its caches, and when it gets worse it starts no new request",
            f"top    # on {rank.name}: end programs that take memory there",
        )
