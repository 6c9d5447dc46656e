"""Whether grammars can be followed, asked in a process of its own: a schema must not take the server with it.

llguidance ends its process for some of them (1.9.1 for a constant of -2**63, by endless recursion).
`python -m cluster.api.grammar_checker` answers for the grammar on its standard input.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from cluster.grammar import GrammarError, check_grammar, check_size, deep_pool

TIMEOUT_S = 20.0
NUM_AT_ONCE = 2
MAX_KEPT = 64  # grammars that were good, each of at most 256 KiB
_BAD = 3  # the exit code, with the reason on standard output


class GrammarChecker:
    """Asks about each grammar once. Event loop only."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._good: dict[str, None] = {}  # the newest last

    async def check(self, grammar: str) -> None:
        """Raises GrammarError with the reason, for a grammar that cannot be followed; "" is none."""
        if not grammar or grammar in self._good:
            return
        check_size(grammar)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(NUM_AT_ONCE, thread_name_prefix="grammars")
        await asyncio.wrap_future(self._pool.submit(_ask, grammar))
        self._good[grammar] = None
        if len(self._good) > MAX_KEPT:
            del self._good[next(iter(self._good))]


def _ask(grammar: str) -> None:
    command = [sys.executable, "-m", "cluster.api.grammar_checker"]
    try:
        done = subprocess.run(
            command, input=grammar.encode(), capture_output=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise GrammarError(f"it takes longer than {TIMEOUT_S:.0f} s to prepare") from None
    if done.returncode == _BAD:
        raise GrammarError(done.stdout.decode("utf-8", "replace"))
    if done.returncode:
        raise GrammarError("the grammar library fails on it; simplify it")


def main() -> int:
    """The exit code for the grammar on standard input."""
    grammar = sys.stdin.buffer.read().decode()
    try:
        deep_pool().submit(check_grammar, grammar).result()
    except GrammarError as error:
        sys.stdout.buffer.write(str(error).encode())
        return _BAD
    return 0


if __name__ == "__main__":
    sys.exit(main())
