"""The border of every command of deploy/: what it raises becomes one sentence and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from cluster.border import drop_output, open_missing_streams, unforeseen
from cluster.errors import EXIT_ERROR, UserError

INTERRUPTED = 130  # as a shell reports Ctrl-C


def run_command(name: str, command: Callable[[], int], *, is_verbose: bool) -> int:
    """What `command` returns, or the exit code of what it raised: a UserError's own, 130 for Ctrl-C, 1 else.

    Output that nobody reads any more (`| head -1`) ends it without a word; output that cannot be written
    (a full disk) is a failure, too.
    """
    failure: Exception
    open_missing_streams()
    try:
        code = command()
        sys.stdout.flush()
        return code
    except UserError as error:
        failure, message, code = error, str(error), error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        drop_output()
        return EXIT_ERROR
    except Exception as error:  # the border of main
        failure, message, code = error, unforeseen(error), EXIT_ERROR
    if is_verbose:
        traceback.print_exception(failure)
    print(f"{name}: {message}", file=sys.stderr, flush=True)
    return code
