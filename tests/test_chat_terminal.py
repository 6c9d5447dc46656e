"""`macrame chat` as a user has it: on a real terminal, with a real ring that is slow enough to be stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from deploy.demo.run import CONFIG
from tests.ring_processes import RingProcesses
from tests.terminal import CTRL_C, CTRL_D, Terminal, on_terminal

pytestmark = pytest.mark.long
MODEL = CONFIG.parent / "model"
SLOW = {2: "step_delay_ms=40"}  # 25 tokens/s: an answer of 400 tokens takes 16 s
PROMPT = ">>>"
LAYERS = [(0, 3), (3, 8), (8, 9)]


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RingProcesses]:
    folder = tmp_path_factory.mktemp("ring")
    with RingProcesses(folder, MODEL, LAYERS, faults=SLOW, with_api=True) as ring:
        ring.wait_api()
        yield ring


@pytest.fixture
def chat(ring: RingProcesses, tmp_path: Path) -> Iterator[Terminal]:
    with chatting(ring, tmp_path) as terminal:
        terminal.expect("/help lists commands, Ctrl-D leaves.")
        terminal.expect(PROMPT)
        yield terminal


def ask(chat: Terminal, line: str, answer: str) -> None:
    """Type a line at the prompt; until the answer and the next prompt are shown."""
    chat.say(line)
    chat.expect(answer)
    chat.expect(PROMPT)


def chatting(ring: RingProcesses, home: Path) -> AbstractContextManager[Terminal]:
    url = f"http://127.0.0.1:{ring.api_port}"
    return on_terminal([sys.executable, "-m", "deploy.chat", "--url", url], env={"XDG_STATE_HOME": str(home)})


def test_two_turns_settings_saved_and_loaded(chat: Terminal, ring: RingProcesses, tmp_path: Path) -> None:
    saved = tmp_path / "kept.json"
    ask(chat, "/set max_tokens 6", "max_tokens is 6 now.")
    ask(chat, "/set temperature 0", "temperature is 0.0 now.")
    ask(chat, "/system Write Python.", "The system message is set.")
    for question in ("def add(a, b):", "def sub(a, b):"):
        ask(chat, question, "(cut off: max_tokens or the context is full; /set max_tokens N, or /clear)")
    ask(chat, "/stats", "session: 2 answers, 12 tokens")
    ask(chat, f"/save {saved}", "Kept in ")
    chat.type(CTRL_D)
    assert chat.finish() == 0
    content = json.loads(saved.read_text())
    assert [message["role"] for message in content["messages"]] == ["user", "assistant"] * 2
    assert (content["system"], content["settings"]) == (
        "Write Python.",
        {"max_tokens": 6, "temperature": 0.0},
    )
    assert saved.stat().st_mode & 0o777 == 0o600
    assert "def sub(a, b):" in (tmp_path / "macrame" / "chat_history").read_text()

    with chatting(ring, tmp_path) as again:
        again.expect(PROMPT)
        ask(again, f"/load {saved}", "4 messages.")
        ask(again, "/system", "Write Python.")
        ask(again, "/set", "max_tokens 6")
        again.type("\x1b[A\x1b[A\x1b[A\x1b[A")  # four lines back: what was typed in the session before
        again.expect("/save")
        again.type(CTRL_C)
        again.expect("Ctrl-D or /exit leaves.")
        again.expect(PROMPT)
        again.say("/exit")
        assert again.finish() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(chat: Terminal, ring: RingProcesses) -> None:
    ask(chat, "/set max_tokens 400", "is 400 now.")
    ask(chat, "/set ignore_eos true", "there is no setting 'ignore_eos'")
    ask(chat, "/set min_tokens 300", "is 300 now.")
    chat.say("def add(a, b):")
    chat.expect("def add(a, b):")
    ring.wait_status(lambda status: status.num_active == 1)
    chat.expect("\n")
    chat.type(CTRL_C)
    chat.expect("(stopped)")
    chat.expect(PROMPT)
    ring.wait_status(lambda status: status.num_active == 0)
    ask(chat, "/set min_tokens 1", "is 1 now.")
    ask(chat, "/set max_tokens 3", "is 3 now.")
    ask(chat, "def mul(a, b):", "(cut off:")
    chat.type(CTRL_D)
    assert chat.finish() == 0


def test_the_completion_of_commands_and_several_lines(chat: Terminal) -> None:
    chat.type("/sys\t")
    chat.expect("/system")
    ask(chat, " Be brief.", "The system message is set.")
    ask(chat, "/set max_tokens 2", "is 2 now.")
    ask(chat, "/set min_tokens 2", "is 2 now.")
    chat.say('"""def one():')
    chat.expect("...")
    ask(chat, '    return 1"""', "(cut off:")
    ask(chat, "/what", "there is no /what: /help lists what there is")
    chat.say("/bye")
    assert chat.finish() == 0


def test_a_ring_that_dies_in_the_middle_of_an_answer_is_one_sentence(tmp_path: Path) -> None:
    with RingProcesses(tmp_path, MODEL, LAYERS, faults=SLOW, with_api=True) as ring:
        ring.wait_api()
        with chatting(ring, tmp_path) as chat:
            chat.expect(PROMPT)
            ask(chat, "/set min_tokens 300", "is 300 now.")
            chat.say("def add(a, b):")
            ring.wait_status(lambda status: status.num_completion_tokens > 3)
            ring.kill(1)
            told = chat.expect("\n>>>", 30.0).strip().splitlines()
            assert "the answer broke off: " in told[-2], told
            assert "rank 1" in told[-2]
            chat.say("and now?")
            told = chat.expect("\n>>>", 30.0).strip().splitlines()
            assert "answers 503: " in told[-2], told
            ring.start(1)
            ring.wait_api()
            ask(chat, "/set min_tokens 1", "is 1 now.")
            ask(chat, "/set max_tokens 3", "is 3 now.")
            ask(chat, "def mul(a, b):", "(cut off:")
            for rank in ring.processes:
                ring.kill(rank)  # also the HTTP process, which ends with rank 0
            ask(chat, "still there?", "does not answer (Connection refused); is the ring running?")
            chat.type(CTRL_D)
            assert chat.finish() == 0
            assert "Traceback" not in chat.seen
