"""`python -m cluster.config_reference FILE`: the tables of docs/configuration.md, made from the code.

Keys, kinds and limits are what the reading code takes, recorded while it reads an example that has every key;
their meanings stand here. Pure but for `main`; main thread only.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import TOP_KEYS, read_config
from cluster.config_read import Table
from planner.kv_quant import KV_BITS, KV_GROUP_SIZES
from planner.load_options import MODES


@dataclass(frozen=True, slots=True)
class Key:
    """What the code cannot say of itself; `kind` only where the code reads a value in a way of its own."""

    meaning: str
    default: str
    kind: str = ""


_HOST = "host name or address, no port"
_PATH = "path"
_TLS = "path; all three of `tls` or none"
_BITS = sorted({bits for _, all_bits in MODES.values() for bits in all_bits})
_SIZES = sorted({size for sizes, _ in MODES.values() for size in sizes})


def _one_of(values: Sequence[Any]) -> str:
    return "one of " + ", ".join(f"`{value}`" for value in values)


KEYS: dict[str, Key] = {
    "model": Key("a folder (absolute, or from this file's folder) or a Hugging Face id", "needed"),
    "context": Key(
        "tokens of one request, prompt and answer together", "the smaller of 8192 and the model's"
    ),
    "concurrency": Key("requests at once; memory for so many is planned, and the rest queue", "1"),
    "max_batch_size": Key(
        "requests whose tokens may share a frame; 1: none do ([batching.md](batching.md))", "automatic: 32"
    ),
    "prefill_chunk": Key(
        "tokens of a prompt in one frame; memory for so many is planned ([batching.md](batching.md))",
        "automatic: from the plan, fewer while answers are written",
    ),
    "strategy": Key("how layers are shared out: [planning.md](planning.md)", '"optimal"'),
    "objective": Key("what `optimal` makes best: [cost_model.md](cost_model.md)", '"latency"'),
    "nodes": Key("the machines; the index is the rank, and rank 0 is the head", "needed"),
    "links": Key("what connections cost: [links.md](links.md)", "[]"),
    "api": Key("where rank 0 serves HTTP", "{}"),
    "security": Key("by what nodes know each other: [security.md](security.md)", "{}"),
    "load": Key("what nodes make of the weights as they load: [loading.md](loading.md)", "{}"),
    "prefix_cache": Key(
        "what ended answers have read stays for prompts that begin alike: [batching.md](batching.md)", "true"
    ),
    "announce": Key("nodes tell the local network that they are there: [nodes.md](nodes.md)", "true"),
    "speculation": Key("who guesses the next tokens: [draft_model.md](draft_model.md)", "{}"),
    "silence_timeout_s": Key(
        "a node that is silent for so long is given up; more where machines or networks halt now and then",
        "1",
    ),
    "stall_timeout_s": Key("a node that loads or computes so long without progress is given up", "120"),
    "nodes[].name": Key("for people, `links` and certificates", "the host, or `node` and the rank"),
    "nodes[].host": Key("where the node listens and the others find it", "needed", _HOST),
    "nodes[].port": Key("and on which port", "50051"),
    "nodes[].chip": Key(
        "what the planner takes the speed from ([profile.md](profile.md))", "told by the node"
    ),
    "nodes[].gpu_cores": Key("the chip's, where its name has several counts", "told by the node"),
    "nodes[].memory_gb": Key(
        "the machine's memory; nodes without it on one host share it. `plan-dry-run`, which asks no other "
        "machine, needs it there",
        "measured by the node",
    ),
    "nodes[].max_memory_gb": Key("the most that macrame may use there", "what the device lets a process use"),
    "nodes[].reserve_gb": Key(
        "left free of that", "the larger of 2 GB and 10 % (below 8 GB of memory: 10 %)"
    ),
    "nodes[].layers": Key(
        "forces these layers onto the node", "the plan decides", '`"start:stop"`, half-open'
    ),
    "nodes[].use": Key("`false` leaves the node out and keeps everybody's rank", "true"),
    "nodes[].device": Key(
        "computes on this one; a ring may have both kinds", "the GPU where MLX has one", '`"cpu"` or `"gpu"`'
    ),
    "links[].between": Key("two names of nodes", "needed", "list of two names"),
    "links[].latency_ms": Key("one way", "0.5 between machines"),
    "links[].bandwidth_gbit_s": Key("of one direction", "10 between machines"),
    "api.host": Key("where HTTP listens; anything but loopback needs keys", '"127.0.0.1"', _HOST),
    "api.port": Key("and on which port; 0 is any free one", "8080"),
    "api.keys_file": Key("the API keys, one a line", "`MACRAME_API_KEYS`, with commas", _PATH),
    "api.queue": Key("requests that may wait; more are answered 429", "64"),
    "api.queue_timeout_s": Key(
        "and so long; then they are answered 503; `null`: until their clients leave", "300"
    ),
    "security.token_file": Key("the cluster's token", "`MACRAME_TOKEN`", _PATH),
    "security.tls": Key("mutual TLS between all nodes", "no TLS"),
    "security.tls.ca": Key("the cluster's CA", "none", _TLS),
    "security.tls.cert": Key("a node's certificate; may contain `{name}` and `{rank}`", "none", _TLS),
    "security.tls.key": Key("its private key, mode 600; the same", "none", _TLS),
    "security.allow_plaintext": Key(
        "a token without encryption is enough in this network: nodes do not warn, `macrame up` makes no "
        "certificates",
        "false",
    ),
    "load.quantize": Key("pack linears and embeddings as `mlx_lm.convert -q` does", "as in the files"),
    "load.quantize.mode": Key("the format", '"affine"'),
    "load.quantize.bits": Key("of a weight, as the mode allows", "the mode's", _one_of(_BITS)),
    "load.quantize.group_size": Key("weights with one scale", "the mode's", _one_of(_SIZES)),
    "load.dtype": Key("what the other weights are cast to", "as in the files"),
    "load.cache": Key("keep what loading made on disk", "where it pays"),
    "load.cache_dir": Key("where; a folder of this machine", "see [loading.md](loading.md)", _PATH),
    "load.cache_gb": Key("at most so much there; what was not used for longest goes first", "100"),
    "load.kv_bits": Key("keys and values in so many bits", "not quantised", _one_of(KV_BITS)),
    "load.kv_group_size": Key("elements of a head with one scale", "64", _one_of(KV_GROUP_SIZES)),
    "load.adapters": Key("LoRA and DoRA adapters of mlx-lm", "[]"),
    "load.adapters[].name": Key("the model name that chooses it", "needed"),
    "load.adapters[].path": Key("its folder", "needed", _PATH),
    "speculation.method": Key(
        "`ngram` repeats what the text has said before, `draft` asks the draft model, `auto` uses both",
        '"auto"',
    ),
    "speculation.draft_model": Key(
        "a small model with the same vocabulary, on rank 0: a folder or a Hugging Face id", "none"
    ),
    "speculation.max_draft_tokens": Key("guessed at once, at most", "8"),
}
ENVIRONMENT = {
    "MACRAME_TOKEN": "the cluster's token, where `security.token_file` names no file",
    "MACRAME_API_KEYS": "the API's keys with commas between them, where `api.keys_file` names no file; and "
    "the key with which `macrame status` and its like ask",
    "MACRAME_CACHE": "where fetched models and the shard cache lie",
    "MACRAME_KERNELS": "`off`: MLX's operations alone; `emulate`: kernels on this CPU, thread by thread, for "
    "tests ([kernels.md](kernels.md))",
    "MACRAME_FAULT": "faults that the tests inject; never set it",
}
# Every key once, so that the reading code takes each; the values do not matter.
EXAMPLE: dict[str, Any] = {
    "model": "m",
    "nodes": [{"host": "a", "layers": "0:1"}, {"host": "b"}],
    "links": [{"between": ["a", "b"]}],
    "security": {"tls": {"ca": "c", "cert": "c", "key": "k"}},
    "load": {"quantize": {"bits": 4}, "adapters": [{"name": "n", "path": "p"}]},
}
MINIMAL: dict[str, Any] = {"model": "m", "nodes": [{"host": "a"}]}


class _Recorder(Table):
    """A Table that notes what is taken from it: path without indices -> kind."""

    def __init__(
        self, file: Path, where: str, value: Any, known: Sequence[str], kinds: dict[str, str]
    ) -> None:
        super().__init__(file, where, value, known)
        self.kinds = kinds
        for key in known:
            kinds.setdefault(self._place(key), "")

    def take_str(self, key: str) -> str | None:
        self._note(key, "text")
        return super().take_str(key)

    def take_choice(self, key: str, choices: Sequence[str], default: str) -> str:
        self._note(key, _one_of(choices))
        return super().take_choice(key, choices, default)

    def take_int(self, key: str, low: int, high: int, default: int | None = None) -> int | None:
        self._note(key, f"whole number, {low} to {_short(high)}")
        return super().take_int(key, low, high, default)

    def take_number(
        self, key: str, high: float, *, is_zero_allowed: bool = False, low: float = 0.0
    ) -> float | None:
        least = "0" if is_zero_allowed else f"{low:g}" if low else "above 0"
        self._note(key, f"number, {least} to {_short(high)}")
        return super().take_number(key, high, is_zero_allowed=is_zero_allowed, low=low)

    def take_bool(self, key: str, default: bool) -> bool:
        self._note(key, "`true` or `false`")
        return super().take_bool(key, default)

    def take_list(self, key: str) -> list[Any]:
        self._note(key, "list")
        return super().take_list(key)

    def take_table(self, key: str, known: Sequence[str]) -> Table:
        self._note(key, "object")
        value = self.values.get(key)
        return _Recorder(self.file, self._path(key), {} if value is None else value, known, self.kinds)

    def take_tables(self, key: str, known: Sequence[str]) -> list[Table]:
        items = self.take_list(key)
        self._note(key, "list of objects")
        return [
            _Recorder(self.file, f"{self._path(key)}[{i}]", item, known, self.kinds)
            for i, item in enumerate(items)
        ]

    def __contains__(self, key: str) -> bool:
        return True  # so that what is read only if it is there is read

    def _note(self, key: str, kind: str) -> None:
        self.kinds[self._place(key)] = kind

    def _place(self, key: str) -> str:
        return re.sub(r"\[\d+\]", "[]", self._path(key))


def recorded() -> dict[str, str]:
    """Each key that the code knows, in its order, and what kind of value it takes."""
    kinds: dict[str, str] = {}
    read_config(_Recorder(Path("example"), "", EXAMPLE, TOP_KEYS, kinds))
    return kinds


def table(prefix: str) -> str:
    """The Markdown table of the keys under `prefix`, which is "" for those of the file itself."""
    rows = ["| key | meaning | value | default |", "|---|---|---|---|"]
    kinds = recorded()
    order = {path: i for i, path in enumerate(kinds)}
    for path, kind in sorted(kinds.items(), key=lambda item: [order[parent] for parent in _lineage(item[0])]):
        if (path.startswith(prefix) if prefix else not re.search(r"[.\[]", path)) and path != prefix:
            key = KEYS[path]
            default = f"`{key.default}`" if _is_json(key.default) else key.default
            name = path.removeprefix(prefix).lstrip(".")
            rows.append(f"| `{name}` | {key.meaning} | {key.kind or kind} | {default} |")
    return "\n".join(rows)


def environment_table() -> str:
    """The Markdown table of the environment variables."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in ENVIRONMENT.items()]
    return "\n".join(["| variable | meaning |", "|---|---|", *rows])


_PLACE = re.compile(r"(<!-- keys: ?([\w\[\].]*|environment) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def rewrite(text: str) -> str:
    """`text` with what stands between `<!-- keys: nodes[] -->` and `<!-- end -->` made anew."""

    def fresh(match: re.Match[str]) -> str:
        prefix = match[2]
        made = environment_table() if prefix == "environment" else table(prefix)
        return f"{match[1]}\n{made}\n\n{match[4]}"

    return _PLACE.sub(fresh, text)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _lineage(path: str) -> list[str]:
    """The keys on the way to `path`, and itself: load, load.adapters, load.adapters[].name."""
    parts = path.split(".")
    return [".".join(parts[:i]).removesuffix("[]") for i in range(1, len(parts))] + [path]


def _short(number: float) -> str:
    return str(int(number)) if number < 10**6 else f"10^{len(str(int(number))) - 1}"


def main(argv: list[str]) -> None:
    """Rewrite each file."""
    for name in argv:
        path = Path(name)
        path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
