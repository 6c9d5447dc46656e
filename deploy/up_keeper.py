"""Keeps the nodes of one machine running: adopts or starts them, starts again what died, stops them.

A thread for each machine, the only one that uses it meanwhile. It tells everything by the board.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from cluster.config import ClusterConfig, NodeConfig
from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE, UserError
from deploy.node_handle import STOP_LIMIT_S, NoAnswerError, NodeHandle, NodeProcess, files_digest
from deploy.restarts import Restarts, how_ended
from deploy.taken_port import port_taken
from deploy.up_board import Board, Phase
from deploy.up_machines import Machine

logger = logging.getLogger(__name__)

SILENT_S = 5.0  # the head's API: then the way to it through ssh is made anew
PORTS_POLL_S = 0.1
MEND_S = 5.0  # between attempts to reach a machine again
PORTS_S = 5.0  # for the sockets of a node that died to be closed
TAIL_LINES = 15
HEAD_RANK = 0


@dataclass(slots=True)
class Kept:
    """One node of the machine."""

    node: NodeConfig
    files: dict[str, tuple[bytes, int]]
    handle: NodeHandle
    arguments: tuple[str, ...] = ()  # for run_node
    restarts: Restarts = field(default_factory=Restarts)
    restart_at: float | None = None  # monotonic; it is down until then
    is_given_up: bool = False


class Keeper:
    """The nodes of one machine; `start` after the machine was prepared, `stop` in any case."""

    def __init__(
        self, machine: Machine, kept: Sequence[Kept], config: ClusterConfig, key: str | None, board: Board
    ) -> None:
        self.machine, self._kept, self._board = machine, kept, board
        self._config, self._api, self._key = config, config.api, key
        self._mend_at: float | None = None  # monotonic, of the next attempt; None: the machine answers
        self.begun_at: float | None = None  # monotonic, when all its nodes ran
        self._found_api_at = 0.0  # monotonic
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"keeper-{machine.name}", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> list[str]:
        """Ends the thread, then the nodes; says in words what did not go well. From any one thread."""
        self.leave()
        if self._mend_at is not None:
            with contextlib.suppress(UserError):  # what cannot be stopped is told for each node
                self.machine.mend()
        return stop_nodes(self.machine, [k.node for k in self._kept], self._board)

    def leave(self) -> None:
        """Ends the thread; the nodes go on."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._find_api()
            for kept in self._kept:
                if self._stopping.is_set():
                    return
                self._begin(kept)
            self.begun_at = time.monotonic()
            while not self._stopping.wait(self.machine.poll_s):
                self._round(time.monotonic())
        except UserError as error:
            self._board.fail(error)
        except Exception as error:  # border of the thread: `up` ends instead of showing what is no more
            logger.exception("the keeper of %s failed", self.machine.name)
            self._board.fail(UserError(f"keeping the nodes of {self.machine.name} failed: {error}"))

    def _find_api(self) -> None:
        """Where the head is on this machine."""
        if any(kept.node.rank == HEAD_RANK for kept in self._kept):
            self._board.client = self.machine.client(self._api, self._key)
        self._found_api_at = time.monotonic()

    # -- the beginning ------------------------------------------------------------------------------------
    def _begin(self, kept: Kept) -> None:
        handle, rank, name = kept.handle, kept.node.rank, kept.node.name
        process = handle.state()
        if process.is_running:
            differs = _difference(process, kept)
            if not differs:
                handle.put_files(kept.files)  # certificates that were renewed
                self._board.set(rank, phase=Phase.RUNNING, process=process, note="")
                self._board.tell("adopted", f"{name} runs already (process {process.pid}): kept.", rank)
                return
            self._board.set(rank, phase=Phase.STOPPING, process=process, note=differs)
            self._board.tell("replaced", f"{name} runs with {differs}: starting it again.", rank)
            if left := handle.stop():
                self._board.tell("left", f"{name}: {left}", rank)
        handle.put_files(kept.files)
        if self._stopping.is_set():
            return
        self._start(kept)
        self._board.tell("started", f"{name} started on {self.machine.name}.", rank)

    def _start(self, kept: Kept) -> None:
        places = [(kept.node.name, kept.node.host, kept.node.port)]
        if kept.node.rank == HEAD_RANK:
            places.append(("the API", self._api.host, self._api.port))
        self._free_ports(kept, places)
        kept.handle.start(kept.arguments)
        self._board.set(
            kept.node.rank, phase=Phase.RUNNING, process=kept.handle.state(), note="", is_new=True
        )

    def _free_ports(self, kept: Kept, places: Sequence[tuple[str, str, int]]) -> None:
        """Waits a moment for the sockets of a process that just died. Raises UserError for others."""
        deadline = time.monotonic() + (PORTS_S if self._board.has_served.is_set() else 0.0)
        while True:
            listeners = kept.handle.listeners([(host, port) for _, host, port in places])
            taken = [
                (what, port, who)
                for (what, _, port), who in zip(places, listeners, strict=True)
                if who is not None
            ]
            if not taken:
                return
            if time.monotonic() > deadline or self._stopping.wait(PORTS_POLL_S):
                what, port, who = taken[0]
                where = "" if self.machine.destination in (None, what) else f" on {self.machine.name}"
                raise port_taken(self._config, kept.node, f"{what}{where}", port, who)

    # -- each round ---------------------------------------------------------------------------------------
    def _round(self, now: float) -> None:
        if self._mend_at is not None and not self._mend(now):
            return
        try:
            for kept in self._kept:
                if not kept.is_given_up:
                    self._look(kept, now)
            is_silent = now - max(self._board.api_heard_at, self._found_api_at) > SILENT_S
            if is_silent and self.machine.destination is not None:
                self._find_api()  # ssh may have connected anew
        except UserError as error:
            # An order whose process is killed there, for memory for instance, is no reason to end a ring
            is_passing = isinstance(error, NoAnswerError) and self._board.has_served.is_set()
            if error.exit_code != EXIT_UNREACHABLE and not is_passing:
                raise
            self._lose(error, now)

    def _look(self, kept: Kept, now: float) -> None:
        rank = kept.node.rank
        if kept.restart_at is not None:
            if now >= kept.restart_at:
                kept.restart_at = None
                self._board.set(rank, num_restarts=kept.restarts.total)
                self._start(kept)
                self._board.tell(
                    "restarted", f"{kept.node.name} was started again.", rank, restarts=kept.restarts.total
                )
            return
        process = kept.handle.state()
        if process.is_running:
            self._board.set(rank, phase=Phase.RUNNING, process=process, note="")
            return
        told = f"{kept.node.name} {how_ended(process.exit_code)}; the end of its log:\n{_tail(kept.handle)}"
        has_served = self._board.has_served.is_set()
        delay_s = kept.restarts.delay_s(process.exit_code, now, has_served=has_served)
        if delay_s is not None:
            kept.restart_at = now + delay_s
            self._board.set(rank, phase=Phase.RESTARTING, process=process, note=how_ended(process.exit_code))
            self._board.tell("died", told, rank, exit_code=process.exit_code)
            return
        kept.is_given_up = True
        self._board.set(rank, phase=Phase.ENDED, process=process, note=how_ended(process.exit_code))
        if not has_served or rank == HEAD_RANK:  # nothing can be served without it
            code = process.exit_code
            raise UserError(told, code if code is not None and code > 0 else EXIT_ERROR)
        self._board.tell("given_up", f"{told}\nIt is not started again.", rank, exit_code=process.exit_code)

    # -- a machine that is away ---------------------------------------------------------------------------
    def _lose(self, error: UserError, now: float) -> None:
        self._mend_at = now + MEND_S
        for kept in self._kept:
            self._board.set(kept.node.rank, phase=Phase.AWAY, note=str(error))
        self._board.tell("away", f"{error}; its nodes may go on. Trying again each {MEND_S:.0f} s.")

    def _mend(self, now: float) -> bool:
        assert self._mend_at is not None
        if now < self._mend_at:
            return False
        try:
            self.machine.mend()
            self._find_api()
        except UserError as error:
            self._mend_at = time.monotonic() + MEND_S
            for kept in self._kept:
                self._board.set(kept.node.rank, note=str(error))
            return False
        self._mend_at = None
        self._board.tell("back", f"{self.machine.name} answers again.")
        return True


def stop_nodes(machine: Machine, nodes: Sequence[NodeConfig], board: Board) -> list[str]:
    """Stops them, all at once where the machine lets us; says in words what did not go well."""
    width = len(nodes) if machine.may_stop_at_once else 1
    with ThreadPoolExecutor(max(1, width), thread_name_prefix="stop") as pool:
        return [told for told in pool.map(lambda node: _stop(machine, node, board), nodes) if told]


def _stop(machine: Machine, node: NodeConfig, board: Board) -> str:
    board.set(node.rank, phase=Phase.STOPPING, note="")
    try:
        left = machine.handle(node.rank).stop(STOP_LIMIT_S)
    except UserError as error:
        board.set(node.rank, phase=Phase.AWAY, note=str(error))
        return f"{node.name} on {machine.name} could not be stopped: {error}"
    board.set(node.rank, phase=Phase.STOPPED)
    return f"{node.name} on {machine.name}: {left}" if left else ""


def _difference(process: NodeProcess, kept: Kept) -> str:
    """In words; empty where the running node is what is wanted."""
    if process.files_digest != files_digest(kept.files):
        return "another config"
    if process.version != kept.handle.version:
        return f"another macrame ({process.version or 'unknown'})"
    return "" if process.arguments == kept.arguments else "other plan options"


def _tail(handle: NodeHandle) -> str:
    return "\n".join(f"    {line}" for line in handle.tail(TAIL_LINES).splitlines() or ["(empty)"])
