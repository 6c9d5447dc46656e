from __future__ import annotations

import random

import pytest

from planner.bars import Look, cells, single, stacked

PLAIN, BLOCKS = Look(), Look(is_unicode=True)


def test_cells_add_up_and_show_all_there_is() -> None:
    rng = random.Random(4)
    for _ in range(500):
        amounts = [rng.choice([0, rng.random(), rng.random() * 1e12]) for _ in range(4)] + [1.0]
        width = rng.randint(5, 60)
        counts = cells(amounts, width)
        assert sum(counts) == width
        assert [count > 0 for count in counts] == [amount > 0 for amount in amounts]


def test_cells_are_in_proportion() -> None:
    assert cells([50, 25, 25, 0], 20) == [10, 5, 5, 0]
    assert cells([332.0, 0.1, 0.1, 0.1], 28) == [25, 1, 1, 1]
    assert cells([1, 1, 1], 10) == [4, 3, 3]


@pytest.mark.parametrize(("look", "bar"), [(PLAIN, "##=-...."), (BLOCKS, "██▓▒░░░░")])
def test_a_stacked_bar_is_read_without_colour(look: Look, bar: str) -> None:
    assert stacked([2, 1, 1, 4], 8, look) == bar


def test_a_single_bar_is_as_long_as_its_share() -> None:
    assert [single(share, 4, PLAIN) for share in (0, 0.01, 0.5, 1, 1.2)] == [
        *("    ", "#   ", "##  ", "####", "####"),
    ]
    assert single(0.5, 4, Look(is_color=True)) == "\x1b[34m##\x1b[0m  "


def test_long_names_keep_their_start_and_end() -> None:
    assert PLAIN.shorten("studio", 6) == "studio"
    assert BLOCKS.shorten("studio-of-anna-1", 8) == "stud…a-1"
    assert PLAIN.shorten("studio-of-anna-1", 8) == "stu..a-1"
