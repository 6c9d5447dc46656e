"""The text that a quantisation is fitted to, as rows of tokens. Main thread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mlx_lm.utils import load_tokenizer
from numpy.typing import NDArray

from cluster.errors import EXIT_USAGE, UserError

NUM_COLUMNS = 256  # tokens in a row
_LINES = 50  # that are cut into tokens at once: tokenizers warn of texts beyond their model's context


def token_rows(folder: Path, text: str, num_tokens: int, named: str) -> NDArray[np.int32]:
    """(num_tokens / 256, 256), spread evenly over `text`. named: what the text is, for the refusal.

    Raises UserError for a folder without a tokenizer and for a text with too few tokens.
    """
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no tokenizer that can be loaded: {error}", EXIT_USAGE) from None
    num_rows = max(1, num_tokens // NUM_COLUMNS)
    lines = text.splitlines(keepends=True)
    parts = ("".join(lines[start : start + _LINES]) for start in range(0, len(lines), _LINES))
    ids = np.concatenate([np.array(tokenizer.encode(part), np.int32) for part in parts])
    if len(ids) < num_rows * NUM_COLUMNS:
        raise UserError(
            f"{named} has {len(ids)} tokens and {num_rows * NUM_COLUMNS} are wanted: give more text, or a "
            "smaller --calibration-tokens",
            EXIT_USAGE,
        )
    starts = np.linspace(0, len(ids) - NUM_COLUMNS, num_rows).astype(np.int64)
    return np.stack([ids[start : start + NUM_COLUMNS] for start in starts])
