"""`macrame chat`: talk to a running ring, on a terminal or through pipes. Main thread only."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from cluster.arguments import Parser
from cluster.errors import EXIT_OK, EXIT_USAGE, UserError
from deploy.chat_commands import Commands, LeaveError
from deploy.chat_turn import Talk, Turn
from deploy.client import Client
from deploy.command import INTERRUPTED, run_command
from deploy.conversation import Conversation
from deploy.sampling_options import add_settings, settings_of
from deploy.screen import Screen
from deploy.stdin_text import joined, piped
from deploy.target import add_target, client_of


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 after a conversation; of a single message 1 or 4 if it was not answered."""
    args = _parser().parse_args(argv)
    return run_command("macrame chat", lambda: _chat(args), is_verbose=args.verbose)


def _parser() -> Parser:
    parser = Parser(
        prog="macrame chat",
        description="Talk to a running ring. On a terminal it is a conversation: Enter sends, Alt-Enter "
        "begins a new line, Ctrl-C stops an answer, Ctrl-D leaves, arrow keys bring earlier lines back, and "
        "/help lists commands such as /system, /set, /save and /stats. With a MESSAGE, or a text piped in, "
        "it answers once and ends. A model's reasoning is shown dim on a terminal and left out of pipes.",
        examples=(
            ("macrame chat", "a conversation with the ring at http://127.0.0.1:8080"),
            ('macrame chat "Why is the sky blue?"', "one answer"),
            ('git diff | macrame chat "Write a commit message for this"', "a pipe and what to do with it"),
            ("macrame chat --lines --json < questions.txt", "each line a question; one JSON object each"),
            ('macrame chat --system "Answer in French." --temperature 0.7', "with a system message"),
        ),
    )
    parser.add_argument("message", nargs="?", metavar="MESSAGE", help="ask this, and end; - reads stdin")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--model", metavar="NAME", help="an adapter of the ring, instead of the model itself")
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on with a conversation that /save kept")
    parser.add_argument("--lines", action="store_true", help="each line piped in is a message of its own")
    parser.add_argument("--think", choices=("on", "off"), help="for models that can: think first, or do not")
    parser.add_argument("--hide-thoughts", action="store_true", help="do not show the reasoning")
    parser.add_argument("--stats", action="store_true", help="tokens and speed after each answer, on stderr")
    parser.add_argument("--no-history", action="store_true", help="do not keep what is typed in a file")
    parser.add_argument("--json", action="store_true", help="one JSON object for each answer")
    add_settings(parser)
    add_target(parser)
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _chat(args: argparse.Namespace) -> int:
    given = None if args.message == "-" else args.message
    is_conversation = args.message is None and sys.stdin.isatty() and sys.stdout.isatty()
    if args.json and is_conversation:
        raise UserError("--json is for a MESSAGE or a pipe, not for a conversation on a terminal", EXIT_USAGE)
    client = client_of(args)
    talk = Talk(
        client,
        _conversation(args, client),
        Screen(sys.stdout, shows_thoughts=not args.hide_thoughts),
        shows_stats=args.stats,
    )
    if is_conversation:
        return _converse(talk, keeps_history=not args.no_history)
    if args.lines:
        messages = [line for line in (piped() or "").splitlines() if line.strip()]
        messages = messages if given is None else [given, *messages]
    else:
        text = joined(given, sys.stdin.read() if given is None and sys.stdin.isatty() else piped())
        messages = [] if text is None else [text]
    if not messages:
        raise UserError("there is no message: give one, or pipe one in", EXIT_USAGE)
    return _answer_each(talk, messages, is_json=args.json)


def _conversation(args: argparse.Namespace, client: Client) -> Conversation:
    """The one to go on with, with what the command line says. Raises UserError."""
    served = client.models()
    if args.model is not None and args.model not in served:
        raise UserError(f"the ring does not serve {args.model!r}, only {', '.join(served)}", EXIT_USAGE)
    conversation = Conversation.load(args.load) if args.load is not None else Conversation("")
    conversation.model = args.model or (
        conversation.model if conversation.model in served else client.model()
    )
    if args.system is not None:
        conversation.system = args.system
    conversation.settings |= settings_of(args)
    if args.think is not None:
        conversation.settings["chat_template_kwargs"] = {"enable_thinking": args.think == "on"}
    return conversation


def _answer_each(talk: Talk, messages: list[str], *, is_json: bool) -> int:
    if is_json:
        talk.screen = Screen(io.StringIO())
    for message in messages:
        turn = talk.say(message)
        if is_json:
            print(json.dumps(_as_json(talk, turn), ensure_ascii=False), flush=True)
        if talk.shows_stats:
            print(turn.timing, file=sys.stderr, flush=True)
        if turn.finish_reason == "stopped":
            return INTERRUPTED
    return EXIT_OK


def _as_json(talk: Talk, turn: Turn) -> dict[str, Any]:
    return {
        "model": talk.conversation.model,
        "content": turn.content,
        "reasoning": turn.reasoning or None,
        "finish_reason": turn.finish_reason,
        "prompt_tokens": turn.num_prompt_tokens,
        "completion_tokens": turn.timing.num_tokens,
        "first_token_s": turn.timing.first_s,
        "tok_s": turn.timing.tok_s,
    }


def _converse(talk: Talk, *, keeps_history: bool) -> int:
    """Until Ctrl-D or /exit. Nothing that goes wrong with one answer ends it."""
    from deploy.chat_input import LineInput  # prompt_toolkit takes a while, and pipes need none

    line_input, commands = LineInput(keeps_history=keeps_history), Commands(talk)
    _greet(talk)
    while True:
        try:
            line = line_input.read()
            if line.startswith("/"):
                told = commands.run(line)
                if told:
                    talk.screen.note(told)
                else:
                    _after(talk)  # /retry
            elif line:
                talk.say(line)
                _after(talk)
        except KeyboardInterrupt:
            talk.screen.note("Ctrl-D or /exit leaves.")
        except UserError as error:
            talk.screen.trouble(str(error))
        except (EOFError, LeaveError):
            return EXIT_OK


def _greet(talk: Talk) -> None:
    talk.screen.note(f"{talk.conversation.model} at {talk.client.url}. /help lists commands, Ctrl-D leaves.")
    health = talk.client.get("/health")
    if health.get("status") != "ok":
        talk.screen.trouble(f"The ring does not answer yet: {health.get('reason') or health.get('status')}")


def _after(talk: Talk) -> None:
    """What is to be said of the answer that was just shown."""
    assert talk.last is not None
    if talk.last.finish_reason == "stopped":
        talk.screen.note("(stopped)")
    elif talk.last.finish_reason == "length":
        talk.screen.note("(cut off: max_tokens or the context is full; /set max_tokens N, or /clear)")
    if talk.shows_stats:
        talk.screen.note(str(talk.last.timing))


if __name__ == "__main__":
    sys.exit(main())
