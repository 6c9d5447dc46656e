"""The slash commands of a chat: each takes the rest of its line, returns what to print. Main thread only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cluster.errors import EXIT_USAGE, UserError
from deploy.chat_turn import Talk
from deploy.conversation import Conversation
from deploy.sampling_options import BY_NAME, read_setting

ALIASES = {"/?": "/help", "/bye": "/exit", "/quit": "/exit", "/q": "/exit", "/reset": "/clear"}
HELP = {
    "/help": ("", "this list"),
    "/clear": ("", "forget the conversation, keep system message and settings"),
    "/system": ("[TEXT | off]", "show, set or remove what the model is told first"),
    "/set": ("[NAME VALUE | NAME off]", "show the settings, set one, or leave it to the model again"),
    "/think": ("on | off | auto", "ask a model that can think to do so, or not to"),
    "/model": ("[NAME]", "show what the ring serves, or talk to another of these"),
    "/retry": ("", "answer the last question again"),
    "/save": ("FILE", "keep the conversation in a file"),
    "/load": ("FILE", "go on with a kept one"),
    "/stats": ("[on | off]", "tokens and speed of this session, or of each answer as it comes"),
    "/exit": ("", "leave (also Ctrl-D)"),
}


class LeaveError(Exception):
    """The user wants to go."""


class Commands:
    """Carries them out on a Talk."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._commands: dict[str, Callable[[str], str]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/system": self._system,
            "/set": self._set,
            "/think": self._think,
            "/model": self._model,
            "/retry": self._retry,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/exit": self._exit,
        }

    def run(self, line: str) -> str:
        """What to print. Raises UserError for what cannot be done, LeaveError for /exit."""
        word, _, rest = line.strip().partition(" ")
        command = self._commands.get(ALIASES.get(word, word))
        if command is None:
            raise UserError(f"there is no {word}: /help lists what there is", EXIT_USAGE)
        return command(rest.strip())

    def _help(self, rest: str) -> str:
        width = max(len(f"{name} {usage}") for name, (usage, _) in HELP.items()) + 2
        lines = [f"{f'{name} {usage}':{width}}{text}" for name, (usage, text) in HELP.items()]
        return "\n".join(
            [*lines, "", 'Begin with """ for several lines, and end with """. Ctrl-C stops an answer.']
        )

    def _clear(self, rest: str) -> str:
        self._talk.conversation.clear()
        return "Forgotten."

    def _system(self, rest: str) -> str:
        conversation = self._talk.conversation
        if not rest:
            return conversation.system or "There is no system message."
        conversation.system = "" if rest == "off" else rest
        return "The system message is set." if conversation.system else "The system message is gone."

    def _set(self, rest: str) -> str:
        settings = self._talk.conversation.settings
        name, _, value = rest.partition(" ")
        if not name:
            shown = [f"{key} {json.dumps(value)}" for key, value in settings.items()]
            return "\n".join(shown or [f"All is as the model has it. There are: {', '.join(BY_NAME)}, stop"])
        if not value.strip():
            raise UserError("give a name and a value, such as /set temperature 0.7", EXIT_USAGE)
        if value.strip() == "off":
            settings.pop(name.replace("-", "_"), None)
            return f"{name} is left to the model."
        name, read = read_setting(name, value.strip())
        settings[name] = read
        return f"{name} is {json.dumps(read)} now."

    def _think(self, rest: str) -> str:
        settings = self._talk.conversation.settings
        if rest not in ("on", "off", "auto"):
            raise UserError("say /think on, /think off or /think auto", EXIT_USAGE)
        given = {k: v for k, v in settings.pop("chat_template_kwargs", {}).items() if k != "enable_thinking"}
        if rest != "auto":
            given["enable_thinking"] = rest == "on"
        if given:
            settings["chat_template_kwargs"] = given
        return f"Thinking is {rest}, for a model whose template asks (enable_thinking)."

    def _model(self, rest: str) -> str:
        served = self._talk.client.models()
        if not rest:
            return "\n".join(
                f"{'*' if name == self._talk.conversation.model else ' '} {name}" for name in served
            )
        if rest not in served:
            raise UserError(f"the ring does not serve {rest!r}, only {', '.join(served)}", EXIT_USAGE)
        self._talk.conversation.model = rest
        return f"The next answer is from {rest}."

    def _retry(self, rest: str) -> str:
        conversation = self._talk.conversation
        kept = list(conversation.messages)
        question = conversation.take_back()
        if question is None:
            raise UserError("there is no question yet", EXIT_USAGE)
        try:
            self._talk.say(question)
        except UserError:
            conversation.messages[:] = kept
            raise
        return ""

    def _save(self, rest: str) -> str:
        path = _path(rest, "/save")
        self._talk.conversation.save(path)
        return f"Kept in {path}."

    def _load(self, rest: str) -> str:
        loaded = Conversation.load(_path(rest, "/load"))
        served = self._talk.client.models()
        note = ""
        if loaded.model not in served:
            note = f" It was with {loaded.model}; {self._talk.conversation.model} goes on with it."
            loaded.model = self._talk.conversation.model
        self._talk.conversation = loaded
        return f"{len(loaded.messages)} messages.{note}"

    def _stats(self, rest: str) -> str:
        if rest in ("on", "off"):
            self._talk.shows_stats = rest == "on"
            return f"Statistics after each answer are {rest}."
        return stats(self._talk)

    def _exit(self, rest: str) -> str:
        raise LeaveError


def _path(rest: str, command: str) -> Path:
    if not rest:
        raise UserError(f"give a file: {command} chat.json", EXIT_USAGE)
    return Path(rest).expanduser()


def stats(talk: Talk) -> str:
    """Of the last answer, of the session, and how full the context is."""
    totals, last = talk.totals, talk.last
    if last is None:
        return "There was no answer yet."
    used = last.num_prompt_tokens + last.timing.num_tokens
    context = talk.client.cluster().get("context") or 0
    room = f" of {context}" if context else ""
    return "\n".join(
        [
            f"last answer: {last.timing}",
            f"session: {totals.num_answers} answers, {totals.num_tokens} tokens in {totals.answer_s:.1f} s",
            f"context: {used}{room} tokens"
            if last.num_prompt_tokens
            else "context: not known of an answer cut short",
        ]
    )
