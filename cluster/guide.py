"""Holds answers to their grammars on the last stage: which tokens may come next (llguidance).

A guide's state follows the session's history, so that a replay, or a draft that was refused, needs no care.
Grammars are compiled on a thread of their own while the prompt is read. All else is the caller's: the mask
after a token is made while that token goes round the ring, or at the latest when it is asked for. On a stage
all of it runs in a process beside (cluster/guide_process.py).
"""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from cluster.grammar import GrammarError, check_size, deep_pool, one_line

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

Mask = NDArray[np.bool_]  # (vocab_size,)


class Guides:
    """Makes the guides of one model. The library's view of the vocabulary is built for the first of them."""

    def __init__(self, model_dir: Path, vocab_size: int) -> None:
        self._model_dir, self._vocab_size = model_dir, vocab_size
        self._pool: ThreadPoolExecutor | None = None
        # In the order in which they will be asked; those of closed sessions are gone.
        self._expecting: WeakKeyDictionary[Guide, None] = WeakKeyDictionary()
        self._vocabulary: tuple[LLTokenizer, frozenset[int]] | None = None

    def open(self, grammar: str) -> Guide:
        """A guide for one answer; compiled while the caller goes on."""
        if self._pool is None:
            self._pool = deep_pool()
        return Guide(self._pool.submit(self._compile, grammar), self._vocab_size, self._expecting)

    def prepare(self) -> bool:
        """Make a mask that will be asked for, when there is nothing else to do; False: none was left."""
        guide = next(iter(self._expecting), None)
        if guide is not None:
            guide.prepare()
        return guide is not None

    def _compile(self, grammar: str) -> tuple[LLMatcher, frozenset[int]]:
        from llguidance import LLMatcher

        check_size(grammar)
        if self._vocabulary is None:
            self._vocabulary = self._read_vocabulary()
        view, eos_ids = self._vocabulary
        matcher = LLMatcher(view, grammar)
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {one_line(matcher.get_error())}")
        return matcher, eos_ids

    def _read_vocabulary(self) -> tuple[LLTokenizer, frozenset[int]]:
        """About a second, and 0.2 GB, for 150,000 tokens."""
        from llguidance.hf import from_tokenizer

        from cluster.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self._model_dir)
        eos_ids = frozenset(token for token in tokenizer.eos_ids if token < self._vocab_size)
        if not eos_ids:
            raise GrammarError("no token ends an answer of this model, so that none can keep to a grammar")
        try:
            size = max(self._vocab_size, tokenizer.size)
            view = from_tokenizer(tokenizer.hf, n_vocab=size, eos_token=sorted(eos_ids))
        except ValueError as error:
            raise GrammarError(f"this model's tokenizer knows no grammars: {one_line(str(error))}") from error
        logger.info("grammars: %d tokens are known, %d of them end an answer", size, len(eos_ids))
        return view, eos_ids


class Guide:
    """Which tokens may follow in one answer. One thread only."""

    def __init__(
        self,
        compiled: Future[tuple[LLMatcher, frozenset[int]]],
        vocab_size: int,
        expecting: WeakKeyDictionary[Guide, None],
    ) -> None:
        self.compiled, self._vocab_size = compiled, vocab_size
        self._expecting = expecting  # all guides that have a mask to make
        self._expected: list[int] = []
        self._prepared: tuple[list[int], Mask | None] | None = None
        self._taken: list[int] = []  # of the answer: it keeps to the grammar so far
        self._num_consumed = 0  # of these, by the matcher: all but an end-of-text token and what is after it

    def expect(self, answer: list[int]) -> None:
        """`answer` is what `allowed` will most likely be asked for next."""
        self._expected = answer
        self._expecting[self] = None

    def prepare(self) -> None:
        """Make the mask of what is expected; a failure is told by `allowed`."""
        del self._expecting[self]
        with contextlib.suppress(GrammarError):
            self._prepared = self._expected, self._allowed(self._expected)

    def allowed(self, answer: list[int]) -> Mask | None:
        """Which tokens may follow `answer`, the ids drawn so far; (vocab_size,).

        An end-of-text token may come where the answer is whole, and nothing else after it. None where
        `answer` itself breaks the grammar: it ends in a draft, and what follows a wrong token is void.
        Raises GrammarError where the library gives up.
        """
        self._expecting.pop(self, None)
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] == answer:
            return prepared[1]
        return self._allowed(answer)

    def _allowed(self, answer: list[int]) -> Mask | None:
        matcher, eos_ids = self.compiled.result()
        if not self._follow(matcher, eos_ids, answer):
            return None
        if len(self._taken) > self._num_consumed:
            ended = np.zeros(self._vocab_size, dtype=np.bool_)
            ended[list(eos_ids)] = True
            return ended
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {one_line(matcher.get_error())}")
        bits = np.unpackbits(mask, count=self._vocab_size, bitorder="little").view(np.bool_)
        if not bits.any():
            raise GrammarError("the grammar cannot be followed: none of this model's tokens may come next")
        return bits

    def _follow(self, matcher: LLMatcher, eos_ids: frozenset[int], answer: list[int]) -> bool:
        """Bring the matcher to the end of `answer`; False if it cannot go there."""
        taken = self._taken
        if answer[: len(taken)] != taken:
            self._go_back(matcher, next(i for i, t in enumerate(taken) if i >= len(answer) or answer[i] != t))
        new = answer[len(taken) :]
        if new and len(taken) == self._num_consumed:
            num_text = next((place for place, token in enumerate(new) if token in eos_ids), len(new))
            num_good = matcher.try_consume_tokens(new[:num_text]) if num_text else 0
            self._num_consumed += num_good
            if num_good < num_text or (num_text < len(new) and not matcher.is_accepting()):
                taken += new[:num_good]
                return False
        taken += new
        return True

    def _go_back(self, matcher: LLMatcher, length: int) -> None:
        if self._num_consumed > length:
            matcher.rollback(self._num_consumed - length)
            self._num_consumed = length
        del self._taken[length:]
