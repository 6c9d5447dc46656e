"""Whether a draft model pays in an answer: when it pauses, and when it is tried again. Pure.

What counts is what came of it: the tokens of each trip, and the time that they took. Times are in trips of
a single token round a ring that has nothing else to do, which is how answers go on without it: so the tokens
for each of these trips are the gain, and below 1 it costs more than it brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

KEEP_GAIN = 0.97  # below it is paused; between this and the next nothing changes
PROVE_GAIN = 1.05  # a trial that ends below it has failed
NUM_TRIAL = 8  # verdicts; the first counts for nothing: it may have waited for what was left to read
NUM_LEAST = 6  # verdicts of a trial, whatever they say
TRIAL_DRAFTS = 3  # guesses at once, at most, while it is tried
FIRST_PAUSE_TOKENS = 32  # doubled with each trial in a row that fails
MAX_PAUSE_TOKENS = 1024
CATCH_UP_SHARE = 0.03  # of the time of a pause: what reading the tokens that it missed may take
_FADING = 0.97  # of what was seen before, with each verdict
# What counts until an answer has shown something, so that a bad trip decides nothing: in a trial, and where
# it paid in the answer before. Texts gain in bursts: with less the quiet between two of them would end it.
_PRIOR_GAIN, _TRIAL_TRIPS, _PROVED_TRIPS = 1.2, 4.0, 16.0
_MAX_LOST = 8.0  # trips, by a single verdict: a machine that stood still says nothing of the guesses


class Turn(Enum):
    """What a verdict changes."""

    NONE = 0
    PROVED = 1  # a trial went well
    PAUSED = 2


@dataclass(slots=True)
class Pause:
    """How long it is not asked: a number of tokens that are written, which grows.

    num_failed: trials in a row that failed. num_tokens: that the pause lasts; 0: there is none.
    """

    num_failed: int = 0
    num_tokens: int = 0
    num_written: int = 0  # since it began

    def begin(self, *, has_failed: bool) -> None:
        """has_failed: it was a trial that ends so; else it has paid until now."""
        self.num_failed = self.num_failed + 1 if has_failed else 0
        self.num_tokens = min(FIRST_PAUSE_TOKENS << min(self.num_failed, 16), MAX_PAUSE_TOKENS)
        self.num_written = 0

    def end(self, *, has_paid: bool = False) -> None:
        """It is asked again; has_paid: and has shown that it is worth it."""
        self.num_tokens = self.num_written = 0
        if has_paid:
            self.num_failed = 0

    def is_over(self, num_missed: int, read_trips: float) -> bool:
        """Whether it is to be tried now, if it must first read `num_missed` tokens, each for `read_trips`.

        A pause whose tokens took too little time for that goes on, but for no more than MAX_PAUSE_TOKENS, or
        for as many tokens as there were to be read when it began.
        """
        if self.num_written < self.num_tokens:
            return False
        is_cheap = num_missed * read_trips <= CATCH_UP_SHARE * self.num_written
        return is_cheap or self.num_written >= max(MAX_PAUSE_TOKENS, num_missed - self.num_written)


@dataclass(slots=True)
class DraftPay:
    """Of one answer. is_proved: it has paid in this answer, or in the one before; else this is a trial."""

    pause: Pause
    is_proved: bool = False
    held_ms: float = 0.0  # since the last verdict: what frames waited for it
    own_ms: float = 0.0  # since then: what it took itself, whether anybody waited or not
    _tokens: float = 0.0
    _trips: float = 0.0
    _num_judged: int = 0

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._trips = _PROVED_TRIPS if self.is_proved else _TRIAL_TRIPS
        self._tokens = _PRIOR_GAIN * self._trips

    @property
    def is_due(self) -> bool:
        """It is to be asked whatever is expected: what that comes from may be of another time."""
        return not self.is_proved and self._num_judged < NUM_LEAST

    @property
    def is_paused(self) -> bool:
        return self.pause.num_tokens > 0

    @property
    def gain(self) -> float:
        """Tokens that came in the time of one without it."""
        return self._tokens / self._trips

    def judge(self, num_tokens: int, trips: float) -> Turn:
        """So many tokens came, which took so long, after it was asked."""
        self._num_judged += 1
        self.held_ms = self.own_ms = 0.0
        if not self.is_proved and self._num_judged == 1:
            return Turn.NONE
        trips = min(trips, num_tokens + _MAX_LOST)
        self._tokens = self._tokens * _FADING + num_tokens
        self._trips = self._trips * _FADING + trips
        if self.is_due:
            return Turn.NONE
        if self.gain < KEEP_GAIN:
            return self.stop()
        if self.is_proved or self._num_judged < NUM_TRIAL:
            return Turn.NONE
        if self.gain < PROVE_GAIN:
            return self.stop()
        self.is_proved = True
        self.pause.end(has_paid=True)
        return Turn.PROVED

    def stop(self) -> Turn:
        """It is not worth it, by what was seen or by what is to be expected."""
        self.pause.begin(has_failed=not self.is_proved)
        return Turn.PAUSED

    def resume(self) -> None:
        """The next trial."""
        self.pause.end()
        self.is_proved, self._num_judged = False, 0
        self._begin()
        self.held_ms = self.own_ms = 0.0


@dataclass(slots=True)
class DraftRecord:
    """Of all answers: what the next one begins with."""

    is_proved: bool = False
    num_pauses: int = 0
    _pause: Pause | None = None

    def begin(self) -> DraftPay:
        """For an answer that begins: where others did not gain, with what is left of their pause."""
        pause = self._pause
        if pause is None:
            return DraftPay(Pause(), self.is_proved)
        if pause.num_tokens and pause.is_over(0, 0.0):
            pause.end()
        return DraftPay(Pause(pause.num_failed, max(0, pause.num_tokens - pause.num_written)))

    def note(self, turn: Turn, pay: DraftPay) -> None:
        """An answer's draft model has turned out so."""
        if turn is Turn.PROVED:
            self.is_proved, self._pause = True, None
        elif turn is Turn.PAUSED:
            self.num_pauses += 1
            self.is_proved, self._pause = False, Pause(pay.pause.num_failed, pay.pause.num_tokens)

    def write(self, num_tokens: int) -> None:
        """An answer, any, goes on with so many tokens."""
        if self._pause is not None:
            self._pause.num_written += num_tokens
