"""`macrame plan`: plan-dry-run, and with --from-running what a running ring would gain from another plan."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cluster import dry_run

FROM_RUNNING = "--from-running"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if FROM_RUNNING not in arguments:
        return dry_run.main(arguments)
    from deploy import from_running  # with an HTTP client that planning does not need

    arguments.remove(FROM_RUNNING)
    return from_running.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
