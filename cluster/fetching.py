"""What a node fetches of a hub model: the headers of the pinned revision, then its own tensors' bytes.

`find` may run on any thread; `fetch` builds the lazy model, so it belongs to the compute thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.lan_copy import PeerSource
from cluster.load_bar import LoadBar
from cluster.tls import Credentials
from planner.adapters import digest_with
from planner.digests import model_digest
from shard_loader.fetch import Fetched, Progress, fetch_tensors
from shard_loader.hub import ModelPlace, find_model
from shard_loader.hub_source import HubSource
from shard_loader.prepare import ask_again
from shard_loader.sources import HubError, Source
from shard_loader.survey import own_tensors

MAX_ASKED = 16  # other nodes at once


class ModelFetcher:
    """The config's model on this node. `result` tells what the last fetch brought."""

    def __init__(self, config: ClusterConfig, rank: int, credentials: Credentials | str | None) -> None:
        self._config, self._rank, self._credentials = config, rank, credentials
        self.result = Fetched({})

    def find(self) -> ModelPlace:
        """A folder, the cached or the fetched headers of the model; raises HubError."""
        with self._peers() as peers:
            return find_model(self._config.model, self._config.model_dir_base, peers=peers)

    def fetch(
        self,
        revision: str,
        digest: str,
        layers: tuple[int, int],
        on_progress: Progress,
        stopping: threading.Event,
    ) -> Path:
        """The folder of the model at `revision`, with all bytes in it that `layers` (half-open) need.

        digest: `planner.headers.model_digest` as the head has it. Raises HubError.
        """
        start, stop = layers
        config, name = self._config, self._config.nodes[self._rank].name
        self.result = Fetched({})
        with self._peers() as peers:
            with ThreadPoolExecutor(MAX_ASKED, thread_name_prefix="ask-peers") as pool:  # some may be off
                list(pool.map(lambda peer: peer.ask(config.model, revision), peers))
            place = find_model(
                config.model,
                config.model_dir_base,
                revision=revision,
                peers=peers,
                on_step=lambda: on_progress(0, 0),
            )
            here = digest_with(model_digest(place.folder), config.adapters)
            if here != digest:
                raise HubError(
                    f"{name} has other files for {config.model} at {revision[:12]} (digest {here}, the "
                    f"head's is {digest}); remove {place.folder} there and start it again"
                )
            store = place.store
            if store is None or start == stop:
                return place.folder
            sources: list[Source] = [*peers, HubSource()]
            ask_again(store, sources)
            tensors = own_tensors(place.folder, start, stop)
            bar = LoadBar(name, verb="fetch")

            def report(here_bytes: int, wanted_bytes: int) -> None:
                if wanted_bytes:
                    bar.update(here_bytes, wanted_bytes)
                on_progress(here_bytes, wanted_bytes)

            self.result = fetch_tensors(store, tensors, sources, report, stopping)
            return place.folder

    @contextlib.contextmanager
    def _peers(self) -> Iterator[list[PeerSource]]:
        """The other nodes of the config, the head first."""
        nodes = [node for node in self._config.nodes if node.use and node.rank != self._rank]
        peers = [PeerSource(node.name, node.address, self._credentials, peer=node.name) for node in nodes]
        try:
            yield peers
        finally:
            for peer in peers:
                peer.close()
