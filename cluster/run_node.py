"""`run_node --rank N --config cluster.json`: one node of the ring; rank 0 is the head and serves HTTP."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import math
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cluster.arguments import Parser
from cluster.config import ClusterConfig, ConfigError, load_config
from cluster.console import say
from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_ERROR, EXIT_OK, EXIT_USAGE, UserError
from cluster.logs import UNSAID, Logs, add_log_arguments, log_choices, said
from cluster.ours import check_packages
from cluster.plan_choices import add_choices, choices_of, without_excluded
from cluster.versions import macrame_version

if TYPE_CHECKING:
    from cluster.tls import Credentials

logger = logging.getLogger("cluster.run_node")

# How long a thread that wants Python's lock waits before it asks for it: a frame that came in must not wait
# 5 ms, Python's own choice, for a graph that is being built. With CUDA a step takes little more than that.
SWITCH_S, CUDA_SWITCH_S = 5e-4, 1e-4
# Operations that MLX's CUDA backend gathers before the GPU gets them: with its own choice, up to 100, the GPU
# begins late with the few that a stage's step has. Read by MLX at its first operation.
CUDA_OPS_A_BUFFER = "50"

STOP_S = 0.7  # for the compute thread and the HTTP process, each
STOP_LIMIT_S = 1.9  # for everything
UNDER_LAUNCHD = "--under-launchd"
# launchd starts again what ends with another code than 0 (SuccessfulExit of launchd.plist(5)) and tells no
# more apart: here 0 is what no restart mends, and what was told to stop ends as after a SIGTERM.
_CODES_UNDER_LAUNCHD = {EXIT_DOES_NOT_FIT: 0, EXIT_USAGE: 0, EXIT_OK: 128 + signal.SIGTERM}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="run_node",
        description="Run one node of the ring in the foreground, until Ctrl-C. Rank 0 is the head: it plans, "
        "and serves the HTTP API. 'macrame node' is the same.",
        examples=(
            ("run_node --rank 0 --config cluster.json", "the head"),
            (
                "run_node --rank 1 --config cluster.json --wait-s 60",
                "another one; exit code 4 without a ring",
            ),
        ),
    )
    parser.add_argument(
        "--rank", type=int, required=True, help="this node's place in the config's nodes, from 0"
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="the cluster's JSON or YAML file, the same everywhere"
    )
    parser.add_argument(
        "--model",
        help="a folder or a hub id, instead of the config's; the same on all nodes",
    )
    parser.add_argument(
        "--wait-s",
        type=_seconds,
        metavar="S",
        help="give up with exit code 4 if the ring is not complete after S seconds (default: wait for ever)",
    )
    add_choices(parser)
    parser.add_argument("--no-api", action="store_true", help="do not start the HTTP process on rank 0")
    parser.add_argument(
        "--check", action="store_true", help="only read the config and the credentials, and say what is wrong"
    )
    parser.add_argument(
        UNDER_LAUNCHD,
        action="store_true",
        help="for a LaunchDaemon: exit code 0 for what no restart mends (2 and 3), 143 when told to stop",
    )
    add_log_arguments(parser)
    parser.add_argument("--version", action="version", version=f"macrame {macrame_version()}")
    return parser.parse_args(argv)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def main(argv: list[str] | None = None) -> int:
    """Run until SIGINT or SIGTERM; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    is_under_launchd = UNDER_LAUNCHD in words
    try:
        args = _parse(words)
        logs = Logs(log_choices(args), args.rank)
    except SystemExit as end:  # of the parser
        if is_under_launchd and end.code == EXIT_USAGE:
            return _code(EXIT_USAGE, is_under_launchd)
        raise
    except UserError as error:
        say(f"run_node: {error}")
        return _code(error.exit_code, is_under_launchd)
    faulthandler.register(signal.SIGUSR1)  # kill -USR1 shows where each thread is
    logs.begin()
    try:
        code = _main(args, logs)
        return code if args.check else _code(code, is_under_launchd)
    finally:
        logs.end()


def _code(code: int, is_under_launchd: bool) -> int:
    """What the process ends with for an exit code."""
    return _CODES_UNDER_LAUNCHD.get(code, code) if is_under_launchd else code


def _main(args: argparse.Namespace, logs: Logs) -> int:
    try:
        check_packages()
        _check_kernels()
        config = load_config(args.config, model=args.model)
        if not 0 <= args.rank < len(config.nodes):
            raise UserError(
                f"--rank {args.rank} is not in {args.config}, which has ranks 0 to {len(config.nodes) - 1}",
                EXIT_USAGE,
            )
        if not config.nodes[args.rank].use:
            raise UserError(
                f"rank {args.rank} has use: false in {args.config}; set it to true to run it", EXIT_USAGE
            )
        if args.rank > 0 and choices_of(args):
            raise UserError(
                f"--exclude, --keep-order and --force are for rank 0, which plans; rank {args.rank} has no "
                "use for them",
                EXIT_USAGE,
            )
        without_excluded(config, args.exclude)
        logs.node = config.nodes[args.rank].name
        config.check_credentials()
        from cluster.tls import load_credentials  # gRPC is imported from here on

        credentials = load_credentials(config, args.rank)
        if args.check:
            return EXIT_OK
        _run(config, args, credentials, logs)
    except ConfigError as error:
        return _end(str(error), EXIT_USAGE)
    except UserError as error:
        return _end(str(error), error.exit_code)
    except KeyboardInterrupt:
        return EXIT_OK


def _check_kernels() -> None:
    from kernels.wanted import wanted  # after check_packages: others have a package of this name

    try:
        wanted()
    except ValueError as error:
        raise UserError(str(error), EXIT_USAGE) from None


def _end(message: str, code: int) -> int:
    logger.info("it ended with exit code %d", code, exc_info=True)
    logger.error("%s", message, extra=said("run_node: "))
    return code


def _run(config: ClusterConfig, args: argparse.Namespace, credentials: Credentials, logs: Logs) -> NoReturn:
    sys.setswitchinterval(SWITCH_S)
    mine = config.nodes[args.rank]
    if sys.platform == "linux" and sum(node.use for node in config.nodes) > 1:
        os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", CUDA_OPS_A_BUFFER)
    if mine.device is not None:
        from cluster.device import choose_device  # MLX is imported from here on

        choose_device(mine.device, f"{args.config}: nodes[{args.rank}]")
    wake, stop = os.pipe()
    os.set_blocking(stop, False)
    # The kernel may give a signal to any thread: only this descriptor surely wakes the main one.
    signal.set_wakeup_fd(stop, warn_on_full_buffer=False)
    signals, stopped = [signal.SIGINT, signal.SIGTERM], _code(EXIT_OK, args.under_launchd)
    previous = {s: signal.signal(s, lambda *_: _leave(logs, stopped)) for s in signals}  # nothing runs yet

    from shard_loader.lean_import import import_lean  # MLX is imported from here on

    import_lean()
    import mlx.core as mx

    from cluster.runtime import Runtime

    if mx.cuda.is_available() and mx.default_device().type == mx.gpu:
        sys.setswitchinterval(CUDA_SWITCH_S)

    runtime = Runtime(
        config,
        args.rank,
        credentials,
        wait_s=args.wait_s,
        with_api=not args.no_api,
        on_stop=lambda: os.write(stop, b"\0"),
        choices=choices_of(args),
        recent=logs.recent,
    )
    logger.info("macrame %s, rank %d, process %d", macrame_version(), args.rank, os.getpid())
    for s in signals:
        signal.signal(s, lambda *_: None)
    try:
        runtime.start()
        why = os.read(wake, 1)[0]
        if runtime.error is None:
            logger.info("stopping: %s", signal.Signals(why).name if why else "told to")
        else:
            logger.error("stopping: %s", runtime.error, extra=UNSAID)  # now, so that the head hears it
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)  # a second Ctrl-C ends the process at once
        watchdog = threading.Timer(STOP_LIMIT_S, _leave, [logs, EXIT_ERROR, "did not stop in time"])
        watchdog.daemon = True
        watchdog.start()
        is_clean = runtime.close(STOP_S)
        watchdog.cancel()
    error = runtime.error
    code = EXIT_OK if error is None else _end(str(error), error.exit_code)
    if not is_clean:
        logger.info("a thread was still busy after its time to stop")
    _leave(logs, _code(code, args.under_launchd))


def _leave(logs: Logs, code: int, why: str = "") -> NoReturn:
    """End the process without the interpreter's own teardown.

    All that had to be closed is closed. A daemon thread that comes back from C++ (gRPC's pollers, MLX) while
    the interpreter goes down would unwind through frames that may not throw, and abort the process.
    """
    if why:
        faulthandler.dump_traceback()
        say(f"run_node: {why}")
    logs.end()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
