"""The border of every command of deploy/: what it raises becomes one sentence and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from cluster.errors import EXIT_ERROR, UserError

INTERRUPTED = 130  # as a shell reports Ctrl-C


def run_command(name: str, command: Callable[[], int], *, is_verbose: bool) -> int:
    """What `command` returns, or the exit code of its UserError or of Ctrl-C."""
    try:
        return command()
    except UserError as error:
        message, code = str(error), error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output is gone
        sys.stderr.close()
        return EXIT_ERROR
    if is_verbose:
        traceback.print_exc()
    print(f"{name}: {message}", file=sys.stderr, flush=True)
    return code
