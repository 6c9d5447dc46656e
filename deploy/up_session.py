"""One run of `macrame up`: prepares machines, keeps nodes, shows them, and stops them. Main thread."""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cluster.config import NodeConfig
from cluster.console import as_word
from cluster.errors import EXIT_ERROR, EXIT_OK, EXIT_UNREACHABLE, UserError
from deploy.command import INTERRUPTED
from deploy.up_board import Board, Event, NodeView, Phase
from deploy.up_display import Display
from deploy.up_files import Hand
from deploy.up_follow import Follower, Seen
from deploy.up_keeper import HEAD_RANK, Keeper, Kept
from deploy.up_machines import HERE, Machine
from deploy.up_record import Placed, Record, read_record, write_record
from deploy.up_rows import Row, rows_of

logger = logging.getLogger(__name__)

DRAW_S = 0.15
FAILED_S = 15.0  # with --detach: a node that failed for so long does not mend by itself
AWAY_STATES = ("waiting", "unreachable", "frozen", "away")


class Session:
    """`run` once."""

    def __init__(
        self,
        *,
        hand: Hand,
        folder: Path,
        nodes: Sequence[tuple[Machine, NodeConfig]],
        machine_at: Callable[[str | None, Placed | None], Machine],
        ssh_options: tuple[str, ...],
        display: Display,
        wait_s: float | None,
        head_arguments: tuple[str, ...] = (),
    ) -> None:
        self._hand, self._folder, self._nodes = hand, folder, nodes
        self._machine_at, self._ssh_options = machine_at, ssh_options
        self._display, self._wait_s, self._head_arguments = display, wait_s, head_arguments
        self._machines = list(dict.fromkeys(machine for machine, _ in nodes))
        self._board = Board(NodeView(n.rank, n.name, m.name) for m, n in nodes)
        self._follower = Follower(self._board)
        self._keepers: list[Keeper] = []
        self._record = Record(ssh_options=ssh_options)
        self._began = time.monotonic()
        self._failed_at: float | None = None

    def run(self, *, is_detached: bool) -> int:
        """Until Ctrl-C, or until the ring is ready. Raises UserError; then nothing of it runs any more."""
        goes_on = False
        try:
            self._prepare()
            self._stop_strangers()
            self._start()
            self._wait(lambda: self._is_ready(is_detached=is_detached))
            self._tell_ready(is_detached=is_detached)
            goes_on = is_detached
            if not goes_on:
                self._wait(lambda: False)
        except KeyboardInterrupt:
            self._display.tell(Event("stopping", "Stopping all nodes ..."))
            if not self._stop():
                return EXIT_ERROR
            return EXIT_OK if self._board.has_served.is_set() else INTERRUPTED
        except BaseException:
            self._stop()
            raise
        finally:
            _ignore_signals()
            for keeper in self._keepers:
                keeper.leave()
            self._follower.close()
            self._display.close()
            for machine in self._machines:
                machine.close()
        return EXIT_OK

    # -- before -------------------------------------------------------------------------------------------
    def _prepare(self) -> None:
        """All machines at once: what is installed over a network takes its time."""
        threads = [
            threading.Thread(target=self._prepare_one, args=(m,), name=f"prepare-{m.name}", daemon=True)
            for m in self._machines
        ]
        for thread in threads:
            thread.start()
        self._wait(lambda: not any(thread.is_alive() for thread in threads))
        self._pump(0.0)

    def _prepare_one(self, machine: Machine) -> None:
        nodes = self._of(machine)

        def show(text: str) -> None:
            for node in nodes:
                self._board.set(node.rank, note=text)

        try:
            machine.prepare(nodes, show)
            machine.check_folders(self._hand.folders)
            show("")
        except UserError as error:
            self._board.fail(error)
        except Exception as error:  # border of the thread
            logger.exception("preparing %s failed", machine.name)
            self._board.fail(UserError(f"preparing {machine.name} failed: {error}"))

    def _stop_strangers(self) -> None:
        """Nodes of an earlier `up` that the config no longer has there."""
        wanted = {(node.rank, machine.destination) for machine, node in self._nodes}
        kept = []
        before = read_record(self._folder)
        for placed in before.nodes:
            if (placed.rank, placed.destination) in wanted:
                continue
            where = f"{placed.name} on {placed.destination or HERE} is no more in the config"
            try:
                machine = self._machine_at(placed.destination, placed)
                if machine not in self._machines:
                    self._machines.append(machine)
                    machine.connect()
                handle = machine.handle(placed.rank)
                was_running = handle.state().is_running
                left = handle.stop() if was_running else ""
                handle.put_files({})  # its secrets have no business there any more
            except UserError as error:
                kept.append(placed)
                text = f"{where}, and could not be stopped: {error}"
                self._display.tell(Event("left", text, placed.rank))
                continue
            if not was_running:
                continue
            text = f"{where}: stopped{f'; {left}' if left else '.'}"
            self._display.tell(Event("left" if left else "removed", text, placed.rank))
        nodes = tuple(machine.placed(node) for machine, node in self._nodes)
        if kept and not self._ssh_options:  # those that are left are reached as before
            self._ssh_options = before.ssh_options
        self._record = Record((*nodes, *kept), self._ssh_options)
        write_record(self._folder, self._record)

    def _start(self) -> None:
        config = self._hand.as_handed
        keys = config.api_keys()
        for machine in self._machines:
            kept = [self._kept(machine, node) for node in self._of(machine)]
            if kept:
                key = keys[0] if keys else None
                self._keepers.append(Keeper(machine, kept, config, key, self._board))
        for keeper in self._keepers:
            keeper.start()
        self._follower.start()

    def _kept(self, machine: Machine, node: NodeConfig) -> Kept:
        arguments = self._head_arguments if node.rank == HEAD_RANK else ()
        return Kept(node, self._hand.files(node.rank), machine.handle(node.rank), arguments)

    def _of(self, machine: Machine) -> list[NodeConfig]:
        return [node for where, node in self._nodes if where is machine]

    # -- meanwhile ----------------------------------------------------------------------------------------
    def _wait(self, is_over: Callable[[], bool]) -> None:
        """Draws until `is_over`. Raises what the threads raise."""
        while not is_over():
            self._pump(DRAW_S)

    def _pump(self, wait_s: float) -> None:
        try:
            news = self._board.events.get(timeout=wait_s) if wait_s else self._board.events.get_nowait()
            while True:
                if isinstance(news, BaseException):
                    raise news
                self._display.tell(news)
                news = self._board.events.get_nowait()
        except queue.Empty:
            self._draw()

    def _draw(self) -> tuple[list[Row], Seen]:
        seen = self._follower.seen
        rows = rows_of(self._board.views(), seen)
        self._display.draw(rows, seen)
        return rows, seen

    def _is_ready(self, *, is_detached: bool) -> bool:
        begun = [keeper.begun_at for keeper in self._keepers]
        seen, now = self._follower.seen, time.monotonic()
        if seen.status == "ok" and all(at is not None and seen.at > at for at in begun):
            return True
        rows = rows_of(self._board.views(), seen)
        failed = next((row for row in rows if row.state == "failed"), None)
        self._failed_at = None if failed is None else self._failed_at or now
        is_hopeless = self._failed_at is not None and now - self._failed_at > FAILED_S
        if is_detached and failed is not None and is_hopeless:
            raise UserError(f"{failed.name} failed: {failed.note}", EXIT_ERROR)
        if self._wait_s is not None and now - self._began > self._wait_s:
            is_away = any(row.state in AWAY_STATES for row in rows)
            raise UserError(
                f"the ring was not ready after {self._wait_s:g} s (--wait-s): {seen.status}: {seen.reason}",
                EXIT_UNREACHABLE if is_away else EXIT_ERROR,
            )
        return False

    def _tell_ready(self, *, is_detached: bool) -> None:
        self._board.has_served.set()
        for view in self._board.views():
            self._board.set(view.rank, is_new=False)
        seen, config = self._follower.seen, self._hand.config
        head = self._nodes[0][0]
        is_through_ssh = head.destination is not None
        url = f"{seen.url}/v1"
        if is_detached and is_through_ssh:
            url = f"http://{config.api.host}:{config.api.port}/v1"
        where = (
            f" on {head.name}"
            if is_through_ssh and is_detached
            else " (through ssh)"
            if is_through_ssh
            else ""
        )
        seconds = time.monotonic() - self._began
        text = f"Ready after {seconds:.1f} s: {url}{where}"
        if is_detached:
            text += f"\nThe nodes go on; 'macrame down --config {as_word(config.path)}' stops them."
        details = {"url": url, "on": head.name, "seconds": round(seconds, 3)}
        self._display.tell(Event("ready", text, details=details))

    # -- after --------------------------------------------------------------------------------------------
    def _stop(self) -> bool:
        """Stops what was started, everywhere at once and uninterrupted; whether all ended by themselves."""
        _ignore_signals()
        began = time.monotonic()
        if not self._keepers:
            return True
        with ThreadPoolExecutor(len(self._keepers), thread_name_prefix="stop") as pool:
            stops: list[Future[list[str]]] = [pool.submit(keeper.stop) for keeper in self._keepers]
            while not all(stop.done() for stop in stops):
                self._draw()
                time.sleep(DRAW_S)
        told = [text for stop in stops for text in stop.result()]
        self._draw()
        left = {view.rank for view in self._board.views() if view.phase is not Phase.STOPPED}
        wanted = {node.rank for _, node in self._nodes}
        rest = tuple(p for p in self._record.nodes if p.rank in left or p.rank not in wanted)
        write_record(self._folder, Record(rest, self._ssh_options))
        for text in told:
            self._display.tell(Event("left", text))
        if not told:
            text = f"All nodes stopped in {time.monotonic() - began:.1f} s."
            self._display.tell(Event("stopped", text))
        return not told


def _ignore_signals() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        # A handler of our own: what is ignored would be ignored by a node that is being started now too.
        signal.signal(getattr(signal, name), lambda *_: None)
