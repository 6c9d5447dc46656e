"""Guessed tokens: how many go with which frame of a request, and what their verdict means. Pure.

A frame may carry guesses behind a known token. The last stage draws after each of them as it always draws,
and a guess was right where it is the token drawn: so an answer with guesses is the answer without, at any
temperature. A guess that chance has no part in is taken this way as often as by any exact method
(https://arxiv.org/abs/2211.17192, with a draft distribution of one token).
Frames of further guesses may follow before the verdict of the first is back. One that follows a wrong guess
is void: its draws are not looked at, and the next frame's position tells every stage to go back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from cluster.draft_pay import TRIAL_DRAFTS, DraftPay, DraftRecord
from cluster.foretold import Foretold
from cluster.ngrams import NO_GUESS, Guess, NGrams
from cluster.trip_times import TripTimes

MIN_GAIN = 1.05  # tokens for the time that they take, against no guesses; less is not worth a guess
MIN_CHANCE = 0.5  # of all guesses before it being right, for a frame that follows them
TRY_EVERY = 64  # that many times no guess seemed worth it: one is made to see whether that is still so
TRY_TOKENS = 3
MIN_READ = 16  # tokens read at once by the draft model, for the time of each to mean something
# How often a guess after a match of so many tokens is right, until the answer itself has shown it, and for
# how many guesses that counts.
DRAFTED = 1  # the "match" of what a draft model says
_PRIOR = {DRAFTED: 0.7, 2: 0.35, 3: 0.5, 5: 0.7, 8: 0.8}
_PRIOR_WEIGHT = 3.0
_FADING = 0.9  # of what was seen before, with each verdict


@dataclass(slots=True)
class Window:
    """A frame's tokens of one request on their way, after the last `num_draws` of which a token is drawn.

    match: how long that of its guesses was; 0: it has none. is_alone: the ring was empty when it was sent.
    is_beside_draft: the draft model was asked for more while it was under way.
    """

    position: int
    tokens: Sequence[int]
    num_draws: int = 1
    match: int = 0
    is_ahead: bool = False  # its first token is a guess, too
    is_alone: bool = False
    is_beside_draft: bool = False
    is_void: bool = False

    @property
    def guesses(self) -> Sequence[int]:
        """Those that the last stage compares with its draws."""
        return self.tokens[len(self.tokens) - self.num_draws + 1 :]


class Acceptance:
    """How often guesses of one answer were right, by the length of their match."""

    def __init__(self) -> None:
        self._right = {match: prior * _PRIOR_WEIGHT for match, prior in _PRIOR.items()}
        self._tried = dict.fromkeys(_PRIOR, _PRIOR_WEIGHT)

    def chance(self, match: int) -> float:
        """That the next such guess is right."""
        return self._right[match] / self._tried[match]

    def renew(self, match: int) -> None:
        """What was seen of such guesses is of another time: it counts no more, and what comes soon does."""
        self._right[match], self._tried[match] = _PRIOR[match], 1.0

    def add(self, match: int, num_right: int, num_wrong: int) -> None:
        """A verdict; of nothing none."""
        if not num_right + num_wrong:
            return
        self._right[match] = self._right[match] * _FADING + num_right
        self._tried[match] = self._tried[match] * _FADING + num_right + num_wrong


@dataclass(slots=True)
class Drafting:
    """The guesses of one answer."""

    text: NGrams
    acceptance: Acceptance = field(default_factory=Acceptance)
    num_declined: int = 0  # times in a row that no guess seemed worth it
    foretold: Foretold | None = None  # None: there is no draft model
    pay: DraftPay | None = None  # with it
    judged_at_ms: float = 0.0  # the latest verdict; 0: not measured

    @property
    def is_read_for(self) -> bool:
        """The draft model reads what was written until now."""
        return self.foretold is not None and self.foretold.is_reading

    @property
    def is_on_trial(self) -> bool:
        """Whether the draft model pays is not known."""
        return self.pay is not None and not self.pay.is_proved

    def extend(self, tokens: Sequence[int]) -> None:
        """The answer goes on with `tokens`."""
        self.text.extend(tokens)
        if self.foretold is not None:
            self.acceptance.add(DRAFTED, *self.foretold.extend(tokens))


@dataclass(slots=True)
class Speculation:
    """What the ring has learned of guesses, over all answers.

    max_drafts: guesses in a frame; 0: none are made. is_reread: after a wrong one, what was right of its
    frame goes into the next frame again.
    """

    max_drafts: int = 0
    is_reread: bool = False
    has_ngrams: bool = True
    trips: TripTimes = field(default_factory=TripTimes)
    read_ms: float = 0.0  # that the draft model takes for one of many tokens that it reads at once
    _draft_samples_ms: deque[float] = field(default_factory=lambda: deque(maxlen=9))  # the latest ones
    record: DraftRecord = field(default_factory=DraftRecord)
    num_drafted: int = 0
    num_guessed: int = 0
    num_right: int = 0

    def guess(self, drafting: Drafting, num_known: int, room: int) -> Guess:
        """The guesses to send behind `num_known` known tokens, at most `room`."""
        wanted = min(self.max_drafts, room)
        if wanted < 1 or not self.trips.is_measured:
            return NO_GUESS
        guess = self._likelier(drafting, wanted, ())
        if not guess.tokens:
            return NO_GUESS
        number = self.best_number(drafting.acceptance.chance(guess.match), num_known, wanted)
        if not number:
            drafting.num_declined += 1
            if drafting.num_declined < TRY_EVERY:
                return NO_GUESS
            number = min(wanted, TRY_TOKENS)
        drafting.num_declined = 0
        return Guess(guess.tokens[:number], guess.match)

    def _likelier(self, drafting: Drafting, wanted: int, ahead: Sequence[int]) -> Guess:
        """What the draft model says, or what the text says: whichever was right more often."""
        chance = drafting.acceptance.chance
        told = [] if drafting.foretold is None else drafting.foretold.after(ahead)[:wanted]
        said = drafting.text.guess(wanted, ahead) if self.has_ngrams else NO_GUESS
        if not told or (said.tokens and chance(said.match) > chance(DRAFTED)):
            return said
        return Guess(tuple(told), DRAFTED)

    def num_to_await(self, drafting: Drafting, num_known: int, room: int) -> int:
        """For how many guesses of the draft model a frame should wait; 0: it should go at once."""
        wanted, foretold = min(self.max_drafts, room), drafting.foretold
        if wanted < 1 or foretold is None or foretold.is_ended or not self.trips.is_measured:
            return 0
        chance = drafting.acceptance.chance
        said = drafting.text.guess(wanted) if self.has_ngrams else NO_GUESS
        if said.tokens and chance(said.match) > chance(DRAFTED):
            return 0
        return self._draft_number(drafting, num_known, wanted)

    def num_to_ask_ahead(self, drafting: Drafting, num_ahead: int, room: int) -> int:
        """How many more guesses to have ready behind those on their way: none in a trial."""
        foretold = drafting.foretold
        if foretold is None or foretold.is_ended or foretold.asked >= 0 or not self.trips.is_measured:
            return 0
        if drafting.is_on_trial or not self._draft_number(drafting, 1, self.max_drafts):
            return 0
        return min(num_ahead + self.max_drafts + 1, num_ahead + room) - len(foretold.ids)

    def _draft_number(self, drafting: Drafting, num_known: int, most: int) -> int:
        """`best_number` of the draft model's guesses; their time counts even where a frame is under way."""
        each = self.draft_ms / self.trips.single_ms
        chance, pay = drafting.acceptance.chance(DRAFTED), drafting.pay
        number = self.best_number(chance, num_known, most, each)
        most_now = min(most, TRIAL_DRAFTS) if drafting.is_on_trial else most
        if number or pay is None:
            return min(number, most_now)
        if pay.is_due:
            return 1
        if most == self.max_drafts or not self.best_number(chance, 1, self.max_drafts, each):
            self.record.note(pay.stop(), pay)
        return 0

    def judge_draft(self, drafting: Drafting, window: Window, num_tokens: int, now_ms: float) -> None:
        """What the draft model was worth, `num_tokens` having come of a window; now_ms: 0: not measured."""
        pay, before_ms = drafting.pay, drafting.judged_at_ms
        drafting.judged_at_ms = now_ms
        self.record.write(num_tokens)
        if pay is None:
            return
        if pay.is_paused:
            pay.pause.num_written += num_tokens
            return
        is_used = window.match == DRAFTED or pay.held_ms or pay.own_ms
        if not is_used or drafting.is_read_for or not self.trips.is_measured:
            return
        single_ms = self.trips.single_ms
        if window.match not in (0, DRAFTED):  # it was not needed: what it did was in vain
            turn = pay.judge(1, 1.0 + pay.own_ms / single_ms)
        elif now_ms and before_ms:
            turn = pay.judge(num_tokens, (now_ms - before_ms) / single_ms)
        else:
            turn = pay.judge(num_tokens, self.trips.ratio(len(window.tokens)) + pay.held_ms / single_ms)
        self.record.note(turn, pay)

    def try_draft(self, drafting: Drafting, num_missed: int) -> bool:
        """Whether a pause of the draft model ends now, of which so many tokens are to be read first."""
        pay = drafting.pay
        if pay is None or not self.trips.is_measured:
            return False
        if not pay.pause.is_over(num_missed, self.read_ms / self.trips.single_ms):
            return False
        pay.resume()
        drafting.acceptance.renew(DRAFTED)
        self._draft_samples_ms.clear()  # it is measured anew: something else may have slowed it down
        return True

    @property
    def draft_ms(self) -> float:
        """That the draft model takes for a token that it guesses; 0: not measured."""
        return median(self._draft_samples_ms) if self._draft_samples_ms else 0.0

    def learn_reading(self, num_tokens: int, own_ms: float) -> None:
        """The draft model took so long to read so many tokens."""
        if num_tokens >= MIN_READ:
            self.read_ms = own_ms / num_tokens

    def learn_draft(self, num_tokens: int, draft_ms: float) -> None:
        """The draft model took so long for so many tokens."""
        self._draft_samples_ms.append(draft_ms / num_tokens)

    def best_number(self, chance: float, num_known: int, most: int, each: float = 0.0) -> int:
        """How many guesses, each right with `chance`, give the most tokens for their time; 0: none does.

        each: what making one takes, where a trip of one token takes 1.0.
        """
        ratio = self.trips.ratio
        best, best_rate = 0, MIN_GAIN / ratio(num_known)
        expected, all_right = 1.0, 1.0  # tokens that come back; that every guess so far was right
        for number in range(1, most + 1):
            all_right *= chance
            expected += all_right
            time = ratio(num_known + number) + number * each
            if self.is_reread:
                time += (1.0 - all_right) * (ratio(1 + round(expected)) - 1.0)
            if expected / time > best_rate:
                best, best_rate = number, expected / time
        return best

    def guess_ahead(
        self, drafting: Drafting, live: Iterable[Window], ahead: Sequence[int], room: int
    ) -> Guess:
        """The tokens of a frame that follows `live` ones before their verdict; NO_GUESS: it is not worth it.

        ahead: all guesses of the live ones, in order.
        """
        if not self.max_drafts or room < 1 or not self.trips.is_measured:
            return NO_GUESS
        guess = self._likelier(drafting, min(self.max_drafts + 1, room), ahead)
        if not guess.tokens:
            return NO_GUESS
        chance = drafting.acceptance.chance
        likely = chance(guess.match)  # its first token, which the last draw before it must be
        for window in live:
            likely *= chance(window.match) ** (len(window.guesses) + window.is_ahead) if window.match else 1.0
        if likely < MIN_CHANCE:
            return NO_GUESS
        number = 1 + self.best_number(chance(guess.match), 1, len(guess.tokens) - 1)
        return Guess(guess.tokens[:number], guess.match)

    def judge(self, drafting: Drafting, window: Window, drawn: Sequence[int], after: Window | None) -> None:
        """Learn from what was drawn after a window's tokens; after: the live one that follows it."""
        if window.guesses:
            num_right = len(drawn) - 1
            self._learn(drafting, window.match, num_right, int(num_right < len(window.guesses)))
        if after is not None and len(drawn) == window.num_draws:
            is_right = after.tokens[0] == drawn[-1]
            self._learn(drafting, after.match, int(is_right), int(not is_right))

    def _learn(self, drafting: Drafting, match: int, num_right: int, num_wrong: int) -> None:
        if match != DRAFTED:  # those are learned from whether they were sent or not
            drafting.acceptance.add(match, num_right, num_wrong)
        self.num_guessed += num_right + num_wrong
        self.num_right += num_right
