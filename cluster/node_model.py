"""The model as one node has it: a folder, or a revision of the hub that it fetches its own part of.

Set by the thread that finds the model, read under the node's lock.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.fetching import ModelFetcher
from cluster.memory_limits import MemoryNeed
from cluster.tls import Credentials
from cluster.work import LoadWork
from planner.adapters import digest_with
from planner.digests import model_digest, sample_files
from proto import control_pb2
from shard_loader.shard_cache import CacheSettings


class NodeModel:
    """What the head's model is compared with, and how its layers are loaded here."""

    def __init__(self, config: ClusterConfig, rank: int, credentials: Credentials | str | None) -> None:
        self.fetcher = ModelFetcher(config, rank, credentials)
        self.folder: Path | None = None
        self.digest = ""
        self.revision = ""  # the hub's commit; empty for a folder
        self.samples: dict[str, str] = {}  # of a folder's weight files, by name
        self._config, self._name = config, config.nodes[rank].name
        self._is_awaiting_head = False  # the model is on the hub, and the head says which revision

    def found(self, folder: Path, revision: str = "") -> None:
        """The folder, or of a hub's `revision` at least the headers, are here: plans are accepted."""
        self.digest = digest_with(model_digest(folder), self._config.adapters)
        self.samples = {} if revision else sample_files(folder)
        self.revision, self.folder = revision, folder

    def expected(self) -> None:
        """No folder here: plans of a hub model are accepted, and fetched."""
        self._is_awaiting_head = True

    @property
    def _is_folder(self) -> bool:
        return self.folder is not None and not self.revision

    def refusal(self, request: control_pb2.AssignRequest) -> str:
        """Why the head's model cannot be this node's, or an empty string."""
        model, name = self._config.model, self._name
        if self.folder is None and not self._is_awaiting_head:
            return f"{name} is still fetching the model"
        if request.revision and not self._is_folder:
            return ""  # fetched, and compared, before it is loaded
        if not self._is_folder:
            return (
                f"the head reads {model} from a folder, which {name} does not have: "
                f"copy it to the same place on {name}, or name a hub id"
            )
        if request.model_digest != self.digest:
            adapters = " and the same adapters" if self._config.adapters else ""
            return (
                f"{name} has other files for {model} (digest {self.digest}, the head's is "
                f"{request.model_digest}); give every node the same revision{adapters}"
            )
        heads = request.file_samples
        other = [file for file in sorted(heads) if self.samples.get(file, heads[file]) != heads[file]]
        if other:
            return (
                f"{other[0]} of {model} has other bytes on {name} than on the head: give every node the same "
                "revision"
            )
        return ""

    def load_work(
        self, request: control_pb2.AssignRequest, layers: tuple[int, int], need: MemoryNeed | None
    ) -> LoadWork:
        """How to load `layers`; of a hub's revision they are fetched first."""
        digest, revision, load = request.model_digest, request.revision, self._config.load
        folder, fetch = self.folder, None
        if revision and not self._is_folder:
            folder, fetch = None, partial(self.fetcher.fetch, revision, digest, layers)
            digest = f"{digest}@{revision}"
        return LoadWork(
            request.epoch,
            folder,
            digest,
            *layers,
            need=need,
            options=load.options,
            adapters=self._config.adapters,
            cache=CacheSettings.of(load.cache, load.cache_dir, load.cache_gb),
            kv=load.kv,
            fetch=fetch,
        )
