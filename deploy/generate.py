"""`macrame generate PROMPT`: one streamed answer of a running ring."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.arguments import Parser
from cluster.errors import EXIT_OK
from deploy.client import Client
from deploy.command import run_command
from deploy.target import add_target, client_of

SILENCE_LIMIT_S = 600.0  # a long prompt on a slow ring gives its first token late


@dataclass(frozen=True, slots=True)
class Timing:
    """One streamed answer. Times in s."""

    num_tokens: int
    first_s: float  # from the request to the first text
    total_s: float

    @property
    def tok_s(self) -> float:
        """Tokens after the first over the time after the first; 0 where there is one token at most."""
        after_first_s = self.total_s - self.first_s
        return (self.num_tokens - 1) / after_first_s if self.num_tokens > 1 and after_first_s > 0 else 0.0

    def __str__(self) -> str:
        first_ms = self.first_s * 1e3
        return f"{self.num_tokens} tokens, {self.tok_s:.1f} tokens/s, first token after {first_ms:.0f} ms"


def main(argv: list[str] | None = None) -> int:
    """Streams the answer to stdout and its timing to stderr; returns the exit code."""
    parser = Parser(prog="macrame generate", description="One streamed answer of a running ring.")
    parser.add_argument("prompt", help="the text to go on from; - reads it from stdin")
    parser.add_argument(
        "--chat", action="store_true", help="send it as a user's message, with the chat template"
    )
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    add_target(parser)
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    return run_command("macrame generate", lambda: _generate(args), is_verbose=args.verbose)


def _generate(args: argparse.Namespace) -> int:
    client = client_of(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    body: dict[str, Any] = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    if args.seed is not None:
        body["seed"] = args.seed
    if args.chat:
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    timing = stream_answer(client, body, lambda text: print(text, end="", flush=True))
    print()
    print(timing, file=sys.stderr)
    return EXIT_OK


def stream_answer(client: Client, body: dict[str, Any], write: Callable[[str], None]) -> Timing:
    """Sends `body` (without model and stream) to the endpoint that fits and writes the text as it comes."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    whole = {"model": client.model(), **body, "stream": True, "stream_options": {"include_usage": True}}
    begin = time.perf_counter()
    first_s, last_s, num_tokens = 0.0, 0.0, 0
    for event in client.stream(path, whole, SILENCE_LIMIT_S):
        if event.get("usage"):
            num_tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content")
            if text or choice["finish_reason"]:
                last_s = time.perf_counter() - begin
                first_s = first_s or last_s
            if text:
                write(text)
    return Timing(num_tokens, first_s, last_s)


if __name__ == "__main__":
    sys.exit(main())
