"""What known sentences of logs mean: why they come, and the command that mends it. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.diagnosis import Finding
from cluster.diagnosis_reach import LOCAL_NETWORK, WHY_65
from cluster.diagnosis_software import OWN_ENVIRONMENT, REINSTALL

MAX_LINE = 300  # characters of a line that are shown


@dataclass(frozen=True, slots=True)
class Known:
    """A sentence that a node, MLX or the system writes."""

    pattern: re.Pattern[str]
    why: str
    mend: str


def _known(pattern: str, why: str, mend: str) -> Known:
    return Known(re.compile(pattern, re.IGNORECASE), why, mend)


KNOWN = (
    _known(
        r"no route to host|errno 65\b|EHOSTUNREACH|\(65\)",
        f"on a Mac: {WHY_65}. Elsewhere, or where `ping` does not reach it either: the machine is "
        "off, asleep "
        "or in another network",
        LOCAL_NETWORK,
    ),
    _known(
        r"another package named '\w+' in .* hides|No module named '(proto|kernels)\.",
        "another package of that name is installed in this environment, or lies in the folder you start from",
        OWN_ENVIRONMENT,
    ),
    _known(
        r"nobody listens at|connection refused",
        "the machine is there, and no node runs on that port: it was not started, or it ended",
        "run_node --rank N --config cluster.json    # there; the end of its log says why it ended before",
    ),
    _known(
        r"in use by another process|address already in use",
        "another program, or a node that was left behind, listens on that port",
        "macrame doctor --config cluster.json    # on that machine: names the process",
    ),
    _known(
        r"cluster token is missing or wrong|has another token",
        "the two sides read different tokens: another file, another MACRAME_TOKEN, or one of them none",
        "sha256sum TOKEN_FILE    # on both machines; copy the right one, chmod 600",
    ),
    _known(
        r"runs with another config|whose configs differ|config digest",
        "the cluster file was changed on one machine, or a node was not started again after a change",
        "macrame doctor --all --config cluster.json    # says which nodes; copy the file there and "
        "restart them",
    ),
    _known(
        r"expired on \d{4}|certificate has expired|certificate that expired",
        "the certificate's time is over, or a clock is wrong",
        "macrame certs make --config cluster.json    # where the CA is; then copy as it says",
    ),
    _known(
        r"not of this cluster's CA|does not take the certificate|certificate verify failed|handshake failed",
        "the two sides have certificates of different CAs, or one of them has none",
        "macrame certs show --config cluster.json    # where the CA is; copy every node its three files",
    ),
    _known(
        r"Insufficient Memory|OutOfMemory|malloc_or_wait|\[malloc\]|cannot allocate memory|out of memory",
        "the GPU or the system had no memory left: other programs took it, or the plan was made for more",
        "plan-dry-run --config cluster.json --why    # then less context, more quantised, or a lower "
        "max_memory_gb",
    ),
    _known(
        r"killed by signal 9|exit code -?9\b|\bKilled\b|exit code 137",
        "the system ended the process: on Linux mostly for want of memory",
        "dmesg | grep -i 'killed process'    # then a lower max_memory_gb for that node",
    ),
    _known(
        r"Caused GPU Timeout|CommandBufferCallbackErrorTimeout|GPU Hang",
        "macOS ends what keeps the GPU for about 5 s: another program used it too, or the machine swaps",
        "macrame doctor --config cluster.json    # looks at memory; end other programs that use the GPU",
    ),
    _known(
        r"no space left on device",
        "a disk that a node writes to is full",
        "macrame doctor --config cluster.json    # says which disk",
    ),
    _known(
        r"nodename nor servname|name or service not known|cannot be resolved|Temporary failure in name",
        "the host name means nothing on that machine: names in .local need Bonjour (on Linux: avahi)",
        "ping NAME    # there; or put the address into the cluster file instead of the name",
    ),
    _known(
        r"has been silent for|does not answer in time|is frozen|without progress",
        "the process or its machine stands still: asleep, swapping, stopped, or its cable is gone",
        "macrame doctor --config cluster.json    # on that machine: sleep settings and memory. If it "
        "only halts now and then: a longer silence_timeout_s",
    ),
    _known(
        r"can be read by other users",
        "whoever has an account on that machine can read the secret",
        "chmod 600 FILE    # the file that the sentence names",
    ),
    _known(
        r"has other files for|has other bytes on|is truncated|says that .* is in .* does not hold it",
        "a model file is another one there, or was cut short while it was copied",
        "macrame doctor --config cluster.json    # on that machine: names the file",
    ),
    _known(
        r"No module named|cannot import name|Symbol not found|undefined symbol",
        "a package is missing, or another version than macrame was made for",
        REINSTALL,
    ),
)


def explain(text: str) -> list[Finding]:
    """One finding for each known sentence in `text`, with the last line that has it."""
    found: dict[int, str] = {}
    for line in text.splitlines():
        for number, known in enumerate(KNOWN):
            if known.pattern.search(line):
                found.pop(number, None)
                found[number] = line.strip()[:MAX_LINE]
                break
    return [
        Finding("sentence", "error", line, KNOWN[number].why, KNOWN[number].mend)
        for number, line in found.items()
    ]
