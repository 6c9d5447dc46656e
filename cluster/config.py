"""The cluster file that all nodes share: one model, its nodes and how to run them.

A ClusterConfig is a frozen value that any thread may read;
only `load_config`, `token` and `api_keys` read files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from cluster.config_api import API_KEYS, ApiConfig, check_api_port, read_api
from cluster.config_forms import own_form, refuse_missing_model
from cluster.config_load import LOAD_KEYS, LoadConfig, read_load
from cluster.config_nodes import LinkConfig, NodeConfig, is_loopback, read_links, read_nodes
from cluster.config_read import ConfigError, Table, read_document, show
from cluster.config_security import SECURITY_KEYS, SecurityConfig, TlsFiles, read_security, tls_files
from cluster.config_speculation import SPECULATION_KEYS, SpeculationConfig, read_speculation
from cluster.console import as_word
from planner.adapters import AdapterFiles

log = logging.getLogger(__name__)

STRATEGIES = ("optimal", "balanced", "memory_proportional", "compute_proportional", "uniform")
OBJECTIVES = ("latency", "throughput", "ttft")
DEFAULT_CONTEXT = 8192  # or the model's own, where that is smaller
MAX_CONTEXT = 10**12
MAX_CONCURRENCY = 10**6
MAX_BATCH_SIZE = 256
MIN_SILENCE_S, MAX_SILENCE_S = 0.5, 60.0  # nodes beat every 0.2 s
MAX_PREFILL_CHUNK = 4096  # its token ids fit into a frame's header

TOP_KEYS = (
    *("model", "context", "concurrency", "max_batch_size", "prefill_chunk", "strategy", "objective"),
    *("nodes", "links", "api", "security", "load", "silence_timeout_s", "stall_timeout_s", "announce"),
    *("prefix_cache", "speculation"),
)


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    path: Path
    model: str  # a folder (absolute, or relative to the file's folder) or a hub id
    nodes: tuple[NodeConfig, ...]
    context: int | None = None  # tokens; None: the smaller of 8192 and the model's
    concurrency: int = 1
    max_batch_size: int | None = None  # requests whose tokens may share a frame; None: see ring_limits
    prefill_chunk: int | None = None  # tokens of a prompt in one frame; None: chosen from the plan
    strategy: str = "optimal"
    objective: str = "latency"
    links: tuple[LinkConfig, ...] = ()
    api: ApiConfig = field(default_factory=ApiConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    silence_timeout_s: float = 1.0  # without a sign of a node's life; then it is given up
    stall_timeout_s: float = 120.0
    prefix_cache: bool = True  # ended sessions stay for prompts that begin like them, where there is room
    announce: bool = True  # nodes beyond loopback tell the local network that they are there
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)

    @property
    def model_dir_base(self) -> Path:
        """The folder that a relative model path starts from: the one the file lies in."""
        return self.path.resolve().parent

    @property
    def adapters(self) -> tuple[AdapterFiles, ...]:
        """The adapters and their folders on this machine."""
        base = self.model_dir_base
        return tuple(AdapterFiles(a.name, base / Path(a.path).expanduser()) for a in self.load.adapters)

    @property
    def digest(self) -> str:
        """16 hex digits of what all nodes must agree on: no secrets, and no paths of one machine."""
        values = asdict(self)
        del values["path"], values["security"], values["api"]["keys_file"], values["announce"]
        del values["prefix_cache"], values["speculation"], values["max_batch_size"]
        values["load"] = self.load.shared()
        path = Path(self.model).expanduser()
        if (self.model_dir_base / path).is_dir() or path.is_absolute():
            values["model"] = path.name  # macrame up hands out copies in which paths are absolute
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def is_loopback(self) -> bool:
        """True where no node listens beyond this machine."""
        return all(is_loopback(node.host) for node in self.nodes)

    def token(self) -> str | None:
        """The cluster's token: from `security.token_file`, else from MACRAME_TOKEN. Raises ConfigError."""
        if self.security.token_file is None:
            return _clean_secret("the environment variable MACRAME_TOKEN", os.environ.get("MACRAME_TOKEN"))
        return _clean_secret(*self._read_secret("security.token_file", self.security.token_file))

    def api_keys(self) -> tuple[str, ...]:
        """The keys that HTTP clients may use; empty where none are configured.

        From `api.keys_file` (one a line), else from MACRAME_API_KEYS (commas). Raises ConfigError.
        """
        if self.api.keys_file is None:
            source, text = "the environment variable MACRAME_API_KEYS", os.environ.get("MACRAME_API_KEYS")
            parts = text.split(",") if text is not None else []
        else:
            source, text = self._read_secret("api.keys_file", self.api.keys_file)
            parts = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        keys = tuple(part.strip() for part in parts if part.strip())
        if text is not None and not keys:
            raise ConfigError(f"{source} holds no key: write at least one there")
        for key in keys:
            _clean_secret(source, key)
        return keys

    def tls_files(self, rank: int) -> TlsFiles | None:
        """The certificate files of a rank on its own machine; None: this cluster talks without TLS."""
        return tls_files(self.security, self.model_dir_base, rank, self.nodes[rank].name)

    def check_credentials(self) -> None:
        """Raises ConfigError where something would listen beyond loopback without a credential.

        A token alone is one, but a warning says what it does not do, unless the file says that it is enough.
        """
        wide = next((node for node in self.nodes if not is_loopback(node.host)), None)
        if wide is not None and not self.security.has_tls:
            if self.token() is None:
                raise ConfigError(
                    f"{self.path}: nodes[{wide.rank}].host = {show(wide.host)} is reachable from other "
                    "machines, which needs certificates or a cluster token: set security.tls "
                    "(macrame certs make), or security.token_file or MACRAME_TOKEN"
                )
            if not self.security.allow_plaintext:
                log.warning(
                    "what the nodes send each other is not encrypted, and the token can be read on the way: "
                    "'macrame certs make' makes certificates for security.tls; if you trust this network, "
                    "set security.allow_plaintext"
                )
        if not is_loopback(self.api.host) and not self.api_keys():
            raise ConfigError(
                f"{self.path}: api.host = {show(self.api.host)} is reachable from other machines, "
                "which needs API keys: set api.keys_file or MACRAME_API_KEYS"
            )

    def with_overrides(
        self,
        *,
        model: str | None = None,
        context: int | None = None,
        concurrency: int | None = None,
        strategy: str | None = None,
        objective: str | None = None,
    ) -> ClusterConfig:
        """A copy where each given value takes the file's place."""
        return replace(
            self,
            model=self.model if model is None else model,
            context=self.context if context is None else context,
            concurrency=self.concurrency if concurrency is None else concurrency,
            strategy=self.strategy if strategy is None else strategy,
            objective=self.objective if objective is None else objective,
        )

    def _read_secret(self, key: str, name: str) -> tuple[str, str]:
        """Where the secret comes from, in words, and the text of its file."""
        path = self.model_dir_base / Path(name).expanduser()
        source = f"{path} ({key})"
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ConfigError(f"{self.path}: {key} = {show(name)} cannot be read: {reason}") from None
        if mode & 0o077:
            log.warning(
                "%s can be read by other users of this machine: run chmod 600 %s", source, as_word(path)
            )
        return source, text


def load_config(path: Path, *, model: str | None = None) -> ClusterConfig:
    """Read a cluster file: macrame's own form, the older distributed_config.json, or an mlx.launch hostfile.

    `model` takes the place of the file's. Raises ConfigError: one sentence with file, key and value.
    """
    return read_config(Table(path, "", own_form(path, read_document(path)), TOP_KEYS), model)


def read_config(table: Table, model: str | None = None) -> ClusterConfig:
    """What a table with TOP_KEYS says; `model` as in load_config. Raises ConfigError."""
    path = table.file
    named = model or table.take_str("model")
    if named is None:
        raise refuse_missing_model(path)
    nodes = read_nodes(table)
    api = read_api(table.take_table("api", API_KEYS))
    check_api_port(path, api, nodes)
    return ClusterConfig(
        path=path,
        model=named,
        nodes=nodes,
        context=table.take_int("context", 1, MAX_CONTEXT),
        concurrency=table.take_int("concurrency", 1, MAX_CONCURRENCY) or 1,
        max_batch_size=table.take_int("max_batch_size", 1, MAX_BATCH_SIZE),
        prefill_chunk=table.take_int("prefill_chunk", 1, MAX_PREFILL_CHUNK),
        strategy=table.take_choice("strategy", STRATEGIES, "optimal"),
        objective=table.take_choice("objective", OBJECTIVES, "latency"),
        links=read_links(table, {node.name for node in nodes}),
        api=api,
        security=read_security(table.take_table("security", SECURITY_KEYS)),
        load=read_load(table.take_table("load", LOAD_KEYS), named),
        silence_timeout_s=table.take_number("silence_timeout_s", MAX_SILENCE_S, low=MIN_SILENCE_S) or 1.0,
        stall_timeout_s=table.take_number("stall_timeout_s", 86400) or 120.0,
        prefix_cache=table.take_bool("prefix_cache", True),
        announce=table.take_bool("announce", True),
        speculation=read_speculation(table.take_table("speculation", SPECULATION_KEYS), named),
    )


def _clean_secret(source: str, text: str | None) -> str | None:
    """The secret without white space around it. Raises ConfigError where it is empty or not printable."""
    if text is None:
        return None
    secret = text.strip()
    if not secret:
        raise ConfigError(f"{source} is empty: write a long random string there")
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ConfigError(f"{source} must be one line of printable ASCII without spaces")
    return secret


__all__ = [
    "ApiConfig",
    "ClusterConfig",
    "ConfigError",
    "LinkConfig",
    "LoadConfig",
    "NodeConfig",
    "SecurityConfig",
    "SpeculationConfig",
    "is_loopback",
    "load_config",
    "read_config",
]
