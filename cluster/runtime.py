"""Puts one node's parts together and takes them apart again. Called from the main thread only."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable

import grpc

from cluster.announce import Announcement
from cluster.api_process import ApiProcess
from cluster.caffeinate import KeepAwake, caffeinate_command
from cluster.config import ClusterConfig
from cluster.console import say
from cluster.control import ControlService
from cluster.coordinator import Coordinator
from cluster.draft_model import find_drafter
from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE, UserError
from cluster.link_service import ProbeService
from cluster.logs import relay, said
from cluster.node import Node
from cluster.peer_links import own_addresses
from cluster.plan_choices import AS_IN_FILE, PlanChoices
from cluster.probe import this_machine
from cluster.recent_lines import RecentLines
from cluster.ring import EdgeService
from cluster.room import MAX_SESSIONS
from cluster.routes import HEAD_RANK
from cluster.rpc import BindError, make_server
from cluster.tls import Credentials
from cluster.usage import peak_rss_bytes
from proto import control_pb2_grpc, head_pb2_grpc
from shard_loader.hub import find_folder

logger = logging.getLogger(__name__)

GOODBYE_S = 0.3  # to take the announcement back
SPARE_WORKERS = 64  # handler threads besides one per request that may wait: edges, watchers, short calls


def _workers_end(timeout_s: float) -> bool:
    """Whether gRPC's handler threads end in time: the interpreter would wait for them without a limit."""
    deadline = time.monotonic() + timeout_s
    for thread in threading.enumerate():
        if thread.name.startswith("rpc"):
            thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.name.startswith("rpc") for thread in threading.enumerate())


class Runtime:
    """One node with its gRPC server, and on rank 0 the coordinator and the HTTP process.

    `on_stop()` is called when the node ends by itself; `error` then says why.
    """

    def __init__(
        self,
        config: ClusterConfig,
        rank: int,
        credentials: Credentials,
        *,
        wait_s: float | None,
        with_api: bool,
        on_stop: Callable[[], object],
        choices: PlanChoices = AS_IN_FILE,
        recent: RecentLines | None = None,
    ) -> None:
        self.config, self.rank = config, rank
        self.error: UserError | None = None
        self._is_closing = False
        self._on_stop = on_stop
        self._wait_s, self._choices = wait_s, choices
        self._node = Node(
            config,
            rank,
            credentials=credentials,
            import_base_rss_bytes=peak_rss_bytes(),
            recent=recent,
        )
        self._edges = EdgeService(
            accept=self._node.accept,
            on_frame=self._node.on_frame,
            on_edge_down=self._node.on_edge_lost,
            beat=self._node.beat,
            incarnation=self._node.incarnation,
            silence_limit_s=config.silence_timeout_s,
        )
        self._control: ControlService | None = None
        self._server: grpc.Server | None = None
        self._coordinator: Coordinator | None = None
        self._with_api = with_api
        self._api: ApiProcess | None = None
        self._patience: threading.Timer | None = None
        self._awake = KeepAwake(caffeinate_command(os.getpid()))
        self._announcement: Announcement | None = None
        self._fetch = threading.Thread(target=self._fetch_model, name="fetch-model", daemon=True)

    def start(self) -> None:
        """Listen, say so, and fetch the model; raises UserError for a busy port."""
        node, mine = self._node, self.config.nodes[self.rank]
        addresses = own_addresses(mine.host)
        self._control = ControlService(node, this_machine(mine.device), addresses)
        services: list[Callable[[grpc.Server], None]] = [
            self._edges.add_to,
            ProbeService(self._control.measurer.accept, node.incarnation).add_to,
            lambda server: control_pb2_grpc.add_ControlServicer_to_server(self._control, server),
        ]
        num_workers = SPARE_WORKERS
        if self.rank == HEAD_RANK:
            self._coordinator = Coordinator(
                self.config,
                node,
                wait_s=self._wait_s,
                on_fatal=self._fatal,
                say=self._say,
                choices=self._choices,
            )
            head = self._coordinator.head
            services.append(lambda server: head_pb2_grpc.add_HeadServicer_to_server(head, server))
            num_requests = self.config.api.queue + max(self.config.concurrency, MAX_SESSIONS)
            num_workers += num_requests + 4 * len(self.config.nodes)
        try:
            self._server, port = make_server(
                mine.address,
                services,
                node.credentials,
                max_workers=num_workers,
                silence_limit_s=self.config.silence_timeout_s,
            )
        except BindError as error:
            raise UserError(str(error), EXIT_ERROR) from error
        node.start()
        self._server.start()
        say(f"NODE_READY {self.rank} {mine.host} {port}", sys.stdout)
        self._awake.start()
        self._fetch.start()
        bound = [address.ip for address in addresses if address.is_bound]
        if self.config.announce and bound:
            self._announcement = Announcement(mine, this_machine(mine.device), bound, self.config.digest)
            self._announcement.start()
        if self._coordinator is not None:
            self._coordinator.start()
            if self._with_api:
                self._api = ApiProcess(
                    self.config.path,
                    self.config.model,
                    mine.address,
                    on_ready=lambda host, port: self._say(f"HTTP API at http://{host}:{port}/v1"),
                    on_failed=lambda reason, code: self._fatal(
                        UserError(reason, code if code > 0 else EXIT_ERROR)
                    ),
                    say=self._say,
                    on_log=relay,
                )
                self._api.start()
        elif self._wait_s is not None:
            self._patience = threading.Timer(self._wait_s, self._check_joined)
            self._patience.daemon = True
            self._patience.start()

    def close(self, timeout_s: float) -> bool:
        """Stop everything; False if a thread was still busy after its time."""
        self._is_closing = True
        if self._patience is not None:
            self._patience.cancel()
        if self._coordinator is not None:
            self._coordinator.close()  # clients get their error while the HTTP process still runs
        if self._api is not None:
            self._api.close(timeout_s)
        if self._control is not None:
            self._control.close()
        self._awake.close()
        if self._announcement is not None:
            self._announcement.close(GOODBYE_S)
        is_clean = self._node.close(timeout_s)
        self._edges.close()
        if self._server is not None:
            is_clean = self._server.stop(0.1).wait(0.5) and is_clean
        return _workers_end(0.3) and is_clean

    def _fetch_model(self) -> None:
        try:
            is_here = find_folder(self.config.model, self.config.model_dir_base) is not None
            if is_here or self.rank == HEAD_RANK:
                if self.rank == HEAD_RANK:
                    self._node.draft_files = find_drafter(self.config)
                place = self._node.model.fetcher.find()
                self._node.model.found(place.folder, place.revision)
            else:
                self._node.model.expected()
        except UserError as error:
            self._fatal(error)
        except (ValueError, OSError) as error:
            self._fatal(UserError(str(error), EXIT_ERROR))

    def _check_joined(self) -> None:
        if not self._node.was_assigned:
            head = self.config.nodes[HEAD_RANK]
            self._fatal(
                UserError(
                    f"the head at {head.address} did not call within {self._wait_s:g} s (--wait-s); "
                    "start rank 0 there",
                    EXIT_UNREACHABLE,
                )
            )

    def _fatal(self, error: UserError) -> None:
        if self.error is None and not self._is_closing:
            self.error = error
        self._on_stop()

    def _say(self, line: str) -> None:
        logger.info("%s", line, extra=said(f"[{self._node.name}] "))
