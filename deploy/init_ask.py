"""The questions of `macrame init`, on a terminal: prompts go to standard error. Main thread only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

from cluster.announce import Heard, listen
from cluster.console import say
from cluster.errors import EXIT_USAGE, UserError
from deploy.init_probe import Machine, is_here
from planner.sizes import size

DEFAULT_MODEL = "mlx-community/Qwen3-1.7B-8bit"
LISTEN_S = 3.0


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks one question after another. Raises UserError where the input ends."""

    answers: TextIO = sys.stdin
    prompts: TextIO = sys.stderr

    def ask(self, question: str, default: str) -> str:
        """The answer without white space around it; an empty one is the default."""
        shown = f"{question} [{default}] " if default else f"{question} "
        self.prompts.write(shown)
        self.prompts.flush()
        line = self.answers.readline()
        if not line:
            raise UserError("there was no answer, and nothing was written", EXIT_USAGE)
        return line.strip() or default

    def choose(self, question: str, choices: Sequence[str]) -> str:
        """One of the choices by its first letter; the first is the default."""
        while True:
            letter = self.ask(question, choices[0]).lower()[:1]
            for choice in choices:
                if choice.startswith(letter):
                    return choice

    def until(self, question: str, default: str, read: Callable[[str], str]) -> str:
        """Asks again, with the sentence of what was wrong, until `read` takes the answer."""
        while True:
            try:
                return read(self.ask(question, default))
            except UserError as error:
                say(f"  {error}", self.prompts)


def ask_hosts(asker: Asker, own: Machine) -> list[str]:
    """ssh destinations; "localhost" first, if this machine is to be a node. Raises UserError for none."""
    shown = f"{own.name}: {own.chip or 'unknown chip'}, {size(own.memory_bytes)}"
    hosts = (
        ["localhost"]
        if asker.choose(f"Is this machine ({shown}) to be a node?", ("yes", "no")) == "yes"
        else []
    )
    found = hear_machines()
    if found:
        say("Heard in the local network (a hint: ssh proves who they are):", asker.prompts)
        for number, one in enumerate(found, 1):
            say(f"  {number}  {one.host}  {one.chip}".rstrip(), asker.prompts)
    numbers = "numbers from the list, or " if found else ""
    question = (
        f"Which others? {numbers}names as ssh takes them (alice@mini2.local), blanks between; empty: none:"
    )
    for word in asker.ask(question, "").replace(",", " ").split():
        is_number = word.isdecimal() and 0 < int(word) <= len(found)
        hosts.append(found[int(word) - 1].host if is_number else word)
    if not hosts:
        raise UserError("a cluster needs at least one machine, and nothing was written", EXIT_USAGE)
    return list(dict.fromkeys(hosts))


def hear_machines() -> list[Heard]:
    """Those that announce a node or a login, each host once and without this one; none where we are deaf."""
    say("Listening for machines in the local network ...")
    try:
        heard = listen(LISTEN_S, with_ssh=True)
    except OSError:
        return []
    hosts: dict[str, Heard] = {}
    for one in heard:  # nodes come first, and say more
        is_name = bool(one.host) and all(c.isalnum() or c in ".-" for c in one.host)
        if is_name and not is_here(one.host):
            hosts.setdefault(one.host, one)
    return list(hosts.values())
