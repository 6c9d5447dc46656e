"""`macrame generate PROMPT`: one answer of a running ring, with all that its API can do. One thread."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from cluster.arguments import Parser
from cluster.errors import EXIT_OK, EXIT_USAGE, UserError
from deploy.answer import Timing, stream_answer
from deploy.client import Client
from deploy.command import run_command
from deploy.sampling_options import add_settings, settings_of
from deploy.screen import Screen
from deploy.stdin_text import piped
from deploy.target import add_target, client_of

__all__ = ["Timing", "main", "stream_answer"]

MAX_TOKENS = 256
WHOLE_LIMIT_S = 3600.0  # for an answer that comes in one piece


def main(argv: list[str] | None = None) -> int:
    """Streams the answer to stdout and its timing to stderr; returns the exit code."""
    args = _parser().parse_args(argv)
    return run_command("macrame generate", lambda: _generate(args), is_verbose=args.verbose)


def _parser() -> Parser:
    parser = Parser(
        prog="macrame generate",
        description="One answer of a running ring, streamed to standard output; its timing goes to standard "
        "error. The prompt goes to the model as it is, or with --chat through its chat template. For a "
        "conversation see macrame chat.",
        examples=(
            ('macrame generate "def fibonacci(n):"', "go on from a text, greedily"),
            ("macrame generate --chat < question.txt", "a user's message from a file"),
            (
                'macrame generate "Once upon a time" --temperature 0.8 --n 3',
                "three different answers",
            ),
            (
                'macrame generate "Hi" --chat --json --field logprobs=true',
                "the API's answer as it is, with log-probabilities",
            ),
        ),
    )
    parser.add_argument("prompt", nargs="?", help="the text to go on from; without it, or with -, read stdin")
    parser.add_argument(
        "--chat", action="store_true", help="send it as a user's message, with the chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told first")
    parser.add_argument("--model", metavar="NAME", help="an adapter of the ring, by its name")
    parser.add_argument("--n", type=int, metavar="N", help="so many answers to one prompt")
    parser.add_argument("--echo", action="store_true", help="begin the answer with the prompt")
    parser.add_argument("--json", action="store_true", help="print the API's whole answer as one JSON object")
    add_settings(parser, f"{MAX_TOKENS}, or half of a smaller context", temperature=0.0)
    add_target(parser)
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _generate(args: argparse.Namespace) -> int:
    client = client_of(args)
    body = _body(args)
    if "max_tokens" not in body:
        body["max_tokens"] = usual_length(client)
    if args.json:
        print(json.dumps(_whole(client, body), indent=2, ensure_ascii=False))
    elif body.get("n", 1) > 1:
        _show_all(_whole(client, body))
    else:
        screen = Screen(sys.stdout)
        try:
            timing = stream_answer(client, body, screen.text)
        finally:
            screen.end()
        print(timing, file=sys.stderr)
    return EXIT_OK


def _body(args: argparse.Namespace) -> dict[str, Any]:
    """The request, without stream. Raises UserError for no prompt, and for what does not go together."""
    prompt = piped() if args.prompt in (None, "-") else args.prompt
    if prompt is None and args.prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise UserError("there is no prompt: give one, or pipe one in", EXIT_USAGE)
    given = {"model": args.model, "n": args.n}
    body = {name: value for name, value in given.items() if value is not None} | settings_of(args)
    if args.system is not None and not args.chat:
        raise UserError("--system is for --chat: a bare prompt has no system message", EXIT_USAGE)
    if args.echo and args.chat:
        raise UserError("--echo is for a bare prompt, not for --chat", EXIT_USAGE)
    if not args.chat:
        return body | {"prompt": prompt} | ({"echo": True} if args.echo else {})
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return body | {"messages": [*system, {"role": "user", "content": prompt}]}


def usual_length(client: Client) -> int:
    """Of an answer: MAX_TOKENS, or half of a context that is small."""
    context = client.cluster().get("context")
    return min(MAX_TOKENS, context // 2) if type(context) is int and context > 1 else MAX_TOKENS


def _whole(client: Client, body: dict[str, Any]) -> dict[str, Any]:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return client.post(path, {"model": client.model(), **body}, WHOLE_LIMIT_S)


def _show_all(content: dict[str, Any]) -> None:
    screen, choices = Screen(sys.stdout), content["choices"]
    for choice in choices:
        screen.note(f"--- {choice['index'] + 1} of {len(choices)}")
        screen.text(choice["text"] if "text" in choice else choice["message"]["content"])
        screen.end()
    print(f"{content['usage']['completion_tokens']} tokens", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
