"""One turn of a chat: sends the conversation, shows the answer as it comes, keeps it. Main thread only."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.errors import UserError
from deploy.answer import Answer, Timing
from deploy.client import Client
from deploy.conversation import Conversation
from deploy.screen import Screen
from deploy.thoughts import ThoughtFilter, without_thought


@dataclass(slots=True)
class Totals:
    """What this session's answers took."""

    num_answers: int = 0
    num_tokens: int = 0
    answer_s: float = 0.0

    def add(self, timing: Timing) -> None:
        self.num_answers += 1
        self.num_tokens += timing.num_tokens
        self.answer_s += timing.total_s


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer, whole or as far as it came."""

    content: str
    reasoning: str
    timing: Timing
    num_prompt_tokens: int
    finish_reason: str  # stop, length, or stopped: by Ctrl-C


@dataclass(slots=True)
class Talk:
    """A conversation with a ring, and the screen that it is shown on."""

    client: Client
    conversation: Conversation
    screen: Screen
    shows_stats: bool = False
    last: Turn | None = None
    totals: Totals = field(default_factory=Totals)
    thinks_first: bool = False  # the model's template opens the thought

    def say(self, text: str) -> Turn:
        """Ask, and show the answer. Ctrl-C ends the answer, and what came of it is kept.

        Raises UserError where the answer failed: then neither it nor the question is part of the
        conversation.
        """
        conversation = self.conversation
        conversation.ask(text)
        answer = Answer(self.client, conversation.body())
        thoughts = ThoughtFilter(is_inside=self.thinks_first)
        texts: list[str] = []
        reasonings: list[str] = []

        def show(pieces: str, *, is_thought: bool) -> None:
            if not is_thought and reasonings and not texts:
                pieces = pieces.lstrip("\n")  # the lines between thought and answer
            if not pieces:
                return
            (reasonings if is_thought else texts).append(pieces)
            (self.screen.thought if is_thought else self.screen.text)(pieces)

        def write(text: str) -> None:
            for part, is_thought in thoughts.feed(text):
                show(part, is_thought=is_thought)

        is_stopped = False
        try:
            answer.run(write, lambda text: show(text, is_thought=True))
        except KeyboardInterrupt:
            is_stopped = True
        except UserError:
            conversation.take_back()
            self.screen.end()
            raise
        for part, is_thought in thoughts.end():
            show(part, is_thought=is_thought)
        self.screen.end()
        content, reasoning = "".join(texts), "".join(reasonings).strip()
        if thoughts.has_closed and not thoughts.has_opened and not self.thinks_first:
            self.thinks_first = True
            content, reasoning = without_thought(content)
        reason = "stopped" if is_stopped else answer.finish_reason
        self.last = Turn(content, reasoning, answer.timing, answer.num_prompt_tokens, reason)
        self.totals.add(answer.timing)
        if is_stopped and not content:
            conversation.take_back()  # nothing came: as if it had not been asked
        else:
            conversation.answered(content, reasoning)
        return self.last
