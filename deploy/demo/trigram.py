"""A trigram model of the demo model's tokens, the baseline its perplexity stands beside; numpy only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DISCOUNT = 0.75


def _lookup(keys: Keys, values: npt.NDArray[np.int64], wanted: Keys) -> Floats:
    """`values` at `wanted`, 0 where absent; `keys` sorted and unique."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0).astype(np.float64)


class Trigram:
    """Interpolated Kneser-Ney with one fixed discount (Chen and Goodman, 1999, section 2.7).

    Trigrams are counted, bigrams and unigrams are counts of distinct left contexts, and the unigram is mixed
    with the uniform distribution, so that every token has a probability above 0.
    """

    def __init__(self, tokens: npt.NDArray[np.uint16], vocab_size: int) -> None:
        self.vocab_size = size = vocab_size
        t = tokens.astype(np.int64)  # (num_tokens,)
        self.tri, self.tri_count = np.unique((t[:-2] * size + t[1:-1]) * size + t[2:], return_counts=True)
        left = self.tri // size
        self.left, first = np.unique(left, return_index=True)  # the pairs (u, v) before a token
        self.left_count = np.add.reduceat(self.tri_count, first)
        self.left_kinds = np.diff(np.append(first, len(left)))

        self.bi, self.bi_count = np.unique(
            self.tri % (size * size), return_counts=True
        )  # distinct u before (v, w)
        self.mid_count = np.bincount(self.bi // size, weights=self.bi_count, minlength=size)
        self.mid_kinds = np.bincount(self.bi // size, minlength=size)
        uni_count = np.bincount(self.bi % size, minlength=size)  # distinct v before w
        total, kinds = uni_count.sum(), np.count_nonzero(uni_count)
        self.uni = (np.maximum(uni_count - DISCOUNT, 0) + DISCOUNT * kinds / size) / total

    def probabilities(self, u: Keys, v: Keys, w: Keys) -> Floats:
        """P(w | u, v), elementwise over equally long arrays of token ids."""
        size = self.vocab_size
        mid_count, bi_count = self.mid_count[v], _lookup(self.bi, self.bi_count, v * size + w)
        seen = np.maximum(mid_count, 1)
        low = np.where(
            mid_count > 0,
            (np.maximum(bi_count - DISCOUNT, 0) + DISCOUNT * self.mid_kinds[v] * self.uni[w]) / seen,
            self.uni[w],
        )
        pair = u * size + v
        left_count = _lookup(self.left, self.left_count, pair)
        left_kinds = _lookup(self.left, self.left_kinds, pair)
        tri_count = _lookup(self.tri, self.tri_count, pair * size + w)
        high = (np.maximum(tri_count - DISCOUNT, 0) + DISCOUNT * left_kinds * low) / np.maximum(left_count, 1)
        answer: Floats = np.where(left_count > 0, high, low)
        return answer

    def perplexity(self, tokens: npt.NDArray[np.uint16]) -> float:
        """Per token, over all of `tokens` but the first two."""
        t = tokens.astype(np.int64)
        return float(np.exp(-np.log(self.probabilities(t[:-2], t[1:-1], t[2:])).mean()))
