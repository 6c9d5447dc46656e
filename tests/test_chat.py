"""What `chat` is made of: conversation, slash commands, thoughts, the screen; the server is a script."""

from __future__ import annotations

import io
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from deploy.chat_commands import HELP, Commands, LeaveError
from deploy.chat_input import is_open, unquoted
from deploy.chat_turn import Talk
from deploy.client import Client
from deploy.conversation import Conversation
from deploy.sampling_options import read_setting
from deploy.screen import DIM, PLAIN, Screen
from deploy.stdin_text import joined
from deploy.thoughts import ThoughtFilter, without_thought
from tests.test_cli import events, server


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def answer(*texts: str, finish: str = "stop", **delta: str) -> bytes:
    """A chat's events."""
    pieces: list[Any] = [
        {"choices": [{"delta": {key: text}, "finish_reason": None}]} for key, text in delta.items()
    ]
    pieces += [{"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in texts]
    pieces.append({"choices": [{"delta": {}, "finish_reason": finish}]})
    usage = {"prompt_tokens": 5, "completion_tokens": len(texts)}
    return events(*pieces, {"choices": [], "usage": usage})


def talk(client: Client, stream: io.StringIO | None = None) -> Talk:
    return Talk(client, Conversation("m"), Screen(stream or io.StringIO()))


def no_client() -> Talk:
    return talk(Client("127.0.0.1", 1))


# -- turns --------------------------------------------------------------------------------------------------
def test_a_turn_sends_the_whole_conversation_and_keeps_the_answer() -> None:
    seen: list[Any] = []
    with server(200, answer("Hel", "lo"), seen) as client:
        one = talk(client)
        one.conversation.system = "Be brief."
        one.conversation.settings = {"temperature": 0.5}
        turn = one.say("Hi")
        one.say("And?")
    assert (turn.content, turn.finish_reason, turn.num_prompt_tokens) == ("Hello", "stop", 5)
    assert seen[-1][2]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "And?"},
    ]
    assert seen[-1][2]["temperature"] == 0.5
    assert seen[-1][2]["stream"] is True
    assert (one.totals.num_answers, one.totals.num_tokens) == (2, 4)


def test_a_failed_turn_leaves_the_conversation_as_it_was() -> None:
    body = events({"choices": [{"delta": {"content": "half"}}]}, {"error": {"message": "node 2 is gone"}})
    stream = io.StringIO()
    with server(200, body) as client:
        one = talk(client, stream)
        with pytest.raises(UserError, match="the answer broke off: node 2 is gone"):
            one.say("Hi")
    assert one.conversation.messages == []
    assert stream.getvalue() == "half\n", "what came is shown, and the next thing begins on its own line"


def test_ctrl_c_keeps_what_came_of_an_answer() -> None:
    class Interrupted(Screen):
        def text(self, text: str) -> None:
            super().text(text)
            if "two" in text:
                raise KeyboardInterrupt

    with server(200, answer("one ", "two ", "three")) as client:
        one = Talk(client, Conversation("m"), Interrupted(io.StringIO()))
        turn = one.say("Count")
    assert (turn.content, turn.finish_reason) == ("one two ", "stopped")
    assert one.conversation.messages[-1] == {"role": "assistant", "content": "one two "}


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_of_its_own_field_is_dim_on_a_terminal_and_no_text_of_a_pipe(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, pipe = Terminal(), io.StringIO()
    with server(200, answer("Four.", **{field: "2 and 2"})) as client:
        one = talk(client, terminal)
        one.say("2+2?")
        talk(client, pipe).say("2+2?")
    assert terminal.getvalue() == f"{DIM}2 and 2{PLAIN}\n\nFour.\n"
    assert pipe.getvalue() == "Four.\n"
    assert one.conversation.messages[-1] == {
        "role": "assistant",
        "content": "Four.",
        "reasoning_content": "2 and 2",
    }


def test_a_model_whose_template_opens_the_thought_is_understood_from_the_second_answer_on() -> None:
    stream = io.StringIO()
    with server(200, answer("hm, ", "yes</think>", "\n\nYes.")) as client:
        one = talk(client, stream)
        first, second = one.say("a"), one.say("b")
    assert (first.content, first.reasoning) == (second.content, second.reasoning) == ("Yes.", "hm, yes")
    assert stream.getvalue() == "hm, yes</think>\n\nYes.\nYes.\n"


# -- thoughts -----------------------------------------------------------------------------------------------
THOUGHTS = [
    ("<think>\nhm</think>\n\nYes.", False, "Yes.", "hm"),
    ("Yes.", False, "Yes.", ""),
    ("  <think>a < b</think>c <think>d</think>", False, "c <think>d</think>", "a < b"),
    ("a <think> tag", False, "a <think> tag", ""),
    ("<thin is no tag", False, "<thin is no tag", ""),
    ("hm</think>Yes.", True, "Yes.", "hm"),
    ("<think>never ends", False, "", "never ends"),
    ("<think></think>Yes.", False, "Yes.", ""),
    ("", False, "", ""),
]


@pytest.mark.parametrize(("text", "is_inside", "content", "reasoning"), THOUGHTS)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_thoughts_are_told_from_text_however_the_pieces_fall(
    text: str, is_inside: bool, content: str, reasoning: str, size: int
) -> None:
    thoughts = ThoughtFilter(is_inside=is_inside)
    pieces = [piece for i in range(0, len(text), size) for piece in thoughts.feed(text[i : i + size])]
    pieces += thoughts.end()
    assert "".join(t for t, is_thought in pieces if not is_thought).strip() == content.strip()
    assert "".join(t for t, is_thought in pieces if is_thought).strip() == reasoning
    if not is_inside:
        assert tuple(part.strip() for part in without_thought(text)) == (content.strip(), reasoning)


@given(st.lists(st.text("a<>/think \n", max_size=8), max_size=12))
def test_no_character_is_lost(pieces: list[str]) -> None:
    thoughts = ThoughtFilter()
    shown = [t for piece in pieces for t, _ in thoughts.feed(piece)] + [t for t, _ in thoughts.end()]
    kept = "".join("".join(pieces).replace("<think>", "").replace("</think>", "").split())
    assert "".join("".join(shown).replace("<think>", "").replace("</think>", "").split()) == kept


# -- slash commands -----------------------------------------------------------------------------------------
def test_every_command_is_in_help_and_every_line_of_help_is_a_command() -> None:
    commands = Commands(no_client())
    assert set(commands._commands) == set(HELP)
    assert all(name in commands.run("/help") for name in HELP)


@pytest.mark.parametrize("word", ["/exit", "/bye", "/quit", "/q"])
def test_leaving(word: str) -> None:
    with pytest.raises(LeaveError):
        Commands(no_client()).run(word)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nope", "there is no /nope: /help lists what there is"),
        ("/set temperature", "give a name and a value, such as /set temperature 0.7"),
        ("/set heat 3", "there is no setting 'heat': max_tokens, temperature"),
        ("/set temperature hot", "temperature must be a number, not 'hot'"),
        ("/set max_tokens 2.5", "max_tokens must be a whole number, not '2.5'"),
        ("/set top_p 7", "top_p: the value should be less than or equal to 1"),
        ("/set temperature nan", "temperature"),
        ("/think maybe", "say /think on, /think off or /think auto"),
        ("/retry", "there is no question yet"),
        ("/save", "give a file: /save chat.json"),
        ("/load", "give a file: /load chat.json"),
        ("/load /nowhere/x.json", "/nowhere/x.json cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(line: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        Commands(no_client()).run(line)
    assert str(error.value).startswith(message)


def test_settings_and_system_message() -> None:
    one = no_client()
    run = Commands(one).run
    assert run("/set").startswith("All is as the model has it. There are: max_tokens")
    assert run("/set max-tokens 9") == "max_tokens is 9 now."
    assert run("/set stop END") == 'stop is ["END"] now.'
    assert run("/think off").startswith("Thinking is off")
    assert one.conversation.settings == {
        "max_tokens": 9,
        "stop": ["END"],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    run("/set max-tokens off")
    run("/think auto")
    assert run("/set") == 'stop ["END"]'
    assert run("/system") == "There is no system message."
    run("/system Be brief.")
    assert run("/system") == "Be brief."
    one.conversation.ask("Hi")
    assert run("/reset") == "Forgotten."
    assert one.conversation.body() == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}],
        "stop": ["END"],
    }
    run("/system off")
    assert one.conversation.system == ""


def test_model_shows_and_changes_what_answers() -> None:
    with server(200, b"{}") as client:
        one = talk(client)
        assert Commands(one).run("/model") == "* m"
        assert Commands(one).run("/model m") == "The next answer is from m."
        with pytest.raises(UserError, match="the ring does not serve 'x', only m"):
            Commands(one).run("/model x")


def test_retry_asks_the_last_question_again_and_a_failure_keeps_the_old_answer() -> None:
    seen: list[Any] = []
    with server(200, answer("new"), seen) as client:
        one = talk(client)
        one.conversation.ask("Q")
        one.conversation.answered("old")
        assert Commands(one).run("/retry") == ""
        assert one.conversation.messages == [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "new"},
        ]
        assert seen[-1][2]["messages"] == [{"role": "user", "content": "Q"}]
    with server(500, b"") as client:
        one.client = client
        with pytest.raises(UserError):
            Commands(one).run("/retry")
    assert one.conversation.messages[-1]["content"] == "new"


def test_stats_say_nothing_before_there_is_an_answer() -> None:
    assert Commands(no_client()).run("/stats") == "There was no answer yet."
    one = no_client()
    assert Commands(one).run("/stats on") == "Statistics after each answer are on."
    assert one.shows_stats


# -- files --------------------------------------------------------------------------------------------------
def test_a_conversation_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    with server(200, b"{}") as client:
        one = talk(client)
        one.conversation.system = "ü"
        one.conversation.ask("Hi")
        one.conversation.answered("Hello", "hm")
        one.conversation.settings = {"temperature": 0.1}
        commands = Commands(one)
        assert commands.run(f"/save {path}") == f"Kept in {path}."
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        saved = one.conversation
        one.conversation = Conversation("m")
        assert commands.run(f"/load {path}") == "2 messages."
        assert one.conversation == saved
        commands.run(f"/save {path}")  # over a saved one it may go
        one.conversation.model = "away"
        commands.run(f"/save {path}")
        one.conversation.model = "m"
        assert commands.run(f"/load {path}") == "2 messages. It was with away; m goes on with it."


def test_no_other_file_is_overwritten_or_loaded(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("years of work")
    with pytest.raises(UserError, match="is there and is no saved chat: choose another name"):
        Conversation("m").save(path)
    assert path.read_text() == "years of work"
    with pytest.raises(UserError, match="is no chat that macrame saved"):
        Conversation.load(path)
    with pytest.raises(UserError, match="cannot be written: "):
        Conversation("m").save(tmp_path / "nowhere" / "chat.json")
    good = {"format": "macrame chat 1", "model": "m", "system": "", "messages": [], "settings": {}}
    for bad in ({"messages": [{"role": "tool", "content": ""}]}, {"messages": ["x"]}, {"system": None}):
        path.write_text(json.dumps(good | bad))
        with pytest.raises(UserError, match="is no chat that macrame saved"):
            Conversation.load(path)


# -- the line and the screen --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "opened", "message"),
    [
        ("hello ", False, "hello"),
        ('"""', True, '"""'),
        ('"""a\nb', True, '"""a\nb'),
        ('"""\na\nb\n"""', False, "a\nb"),
        ('say """x"""', False, 'say """x"""'),
        ('""""""', False, ""),
    ],
)
def test_three_quotes_hold_several_lines(text: str, opened: bool, message: str) -> None:
    assert is_open(text) is opened
    assert unquoted(text) == message


def test_an_answer_cannot_steer_the_terminal() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        Screen(stream).text("a\x1b]0;title\x07\x9b2J\tb\n")
    assert terminal.getvalue() == "a\ufffd]0;title\ufffd\ufffd2J\tb\n"
    assert pipe.getvalue() == "a\x1b]0;title\x07\x9b2J\tb\n", "a pipe gets the bytes"


def test_hidden_thoughts_leave_no_trace() -> None:
    terminal = Terminal()
    screen = Screen(terminal, shows_thoughts=False)
    screen.thought("hm")
    screen.text("Yes.")
    screen.end()
    assert terminal.getvalue() == "Yes.\n"


@pytest.mark.parametrize(
    ("given_text", "piped_text", "message"),
    [
        ("sum up", "text\n", "text\n\nsum up"),
        (None, "text\n", "text\n"),
        ("ask", None, "ask"),
        ("ask", " \n", "ask"),
        (None, None, None),
        (None, "", None),
    ],
)
def test_what_is_piped_stands_before_what_is_given(
    given_text: str | None, piped_text: str | None, message: str | None
) -> None:
    assert joined(given_text, piped_text) == message


def test_a_setting_is_read_as_the_api_reads_it() -> None:
    assert read_setting("min-p", "0.1") == ("min_p", 0.1)
    assert read_setting("seed", "-3") == ("seed", -3)
