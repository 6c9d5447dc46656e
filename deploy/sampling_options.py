"""The options that `chat` and `generate` share: what a request may say of its answer. Pure.

Limits are the API's own (cluster/api/schema.py): it refuses with a sentence that names the field.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.errors import EXIT_USAGE, UserError


@dataclass(frozen=True, slots=True)
class Setting:
    """A field of the API's body that a command line can give."""

    name: str
    kind: Callable[[str], Any]
    metavar: str
    help: str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


SETTINGS = (
    Setting("max_tokens", int, "N", "at most so many tokens"),
    Setting("temperature", float, "T", "0 takes the most probable token; higher is more varied"),
    Setting("top_p", float, "P", "draw from the most probable tokens that make up P"),
    Setting("top_k", int, "K", "draw from the K most probable tokens; 0: from all"),
    Setting("min_p", float, "P", "leave out tokens below P times the most probable one"),
    Setting("seed", int, "N", "the same seed gives the same answer"),
    Setting("repetition_penalty", float, "R", "above 1: repeat less"),
    Setting("repetition_context_size", int, "N", "over how many last tokens; 0: over all"),
    Setting("presence_penalty", float, "X", "-2 to 2: against tokens that were there"),
    Setting("frequency_penalty", float, "X", "-2 to 2: against tokens by how often they were there"),
    Setting("min_tokens", int, "N", "end no sooner"),
)
BY_NAME = {setting.name: setting for setting in SETTINGS}


def add_settings(parser: argparse.ArgumentParser, usual_length: str = "", **defaults: Any) -> None:
    """One option for each setting, --stop, and --field for all else; `settings_of` reads them.

    usual_length: in words, what --max-tokens is where it is not given and has no default here.
    """
    group = parser.add_argument_group("sampling", "what is not given, the model's own settings decide")
    for setting in SETTINGS:
        default = defaults.get(setting.name)
        note = "" if default is None else f" (default {default:g})"
        if setting.name == "max_tokens" and usual_length:
            note = f" (default {usual_length})"
        group.add_argument(
            setting.flag,
            type=setting.kind,
            metavar=setting.metavar,
            default=default,
            help=setting.help + note,
        )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before TEXT; up to 4 times")
    group.add_argument(
        "--field",
        action="append",
        type=_field,
        default=[],
        metavar="NAME=JSON",
        help='any other field of the API\'s request, such as logit_bias={"11": -100}',
    )


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a body that were given."""
    given = {name: value for name in BY_NAME if (value := getattr(args, name)) is not None}
    if args.stop:
        given["stop"] = args.stop
    return given | dict(args.field)


def _field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=JSON")
    if name in ("stream", "stream_options", "messages", "prompt"):
        raise argparse.ArgumentTypeError(f"{name} is what this command itself sends")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a bare word is a text


def read_setting(name: str, text: str) -> tuple[str, Any]:
    """A setting by its name, as in /set, checked as the API checks it. Raises UserError."""
    name = name.replace("-", "_")
    if name == "stop":
        return name, [text]
    setting = BY_NAME.get(name)
    if setting is None:
        raise UserError(f"there is no setting {name!r}: {', '.join((*BY_NAME, 'stop'))}", EXIT_USAGE)
    try:
        value = setting.kind(text)
    except ValueError:
        kind = "a whole number" if setting.kind is int else "a number"
        raise UserError(f"{name} must be {kind}, not {text!r}", EXIT_USAGE) from None
    check_fields({name: value})
    return name, value


def check_fields(fields: dict[str, Any]) -> None:
    """Raises UserError with the API's sentence for a field that it would refuse."""
    from cluster.api.errors import ApiError  # pydantic takes a while, and most runs need none
    from cluster.api.schema import ChatBody, parse_body

    try:
        parse_body(json.dumps(fields).encode(), ChatBody)
    except ApiError as error:
        raise UserError(str(error), EXIT_USAGE) from None
