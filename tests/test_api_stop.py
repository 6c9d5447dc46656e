"""Stop strings: nothing of a stop string is shown, and nothing else is lost, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.stop import StopFilter


def run(pieces: list[str], stops: list[str], *, is_included: bool = False) -> tuple[list[str], bool]:
    """What came out piece by piece, and whether a stop string was met."""
    stop = StopFilter(stops, is_included=is_included)
    shown = []
    for piece in pieces:
        shown.append(stop.push(piece))
        if stop.is_matched:
            return shown, True
    shown.append(stop.flush())
    return shown, False


def test_a_stop_string_across_pieces_is_held_back() -> None:
    assert run(["Hello <", "|e", "nd|> more"], ["<|end|>"]) == (["Hello ", "", ""], True)


def test_text_that_only_began_like_a_stop_string_is_released() -> None:
    assert run(["a<", "|e", "x"], ["<|end|>"]) == (["a", "", "<|ex", ""], False)


def test_what_is_held_at_the_end_is_shown() -> None:
    assert run(["a", "<|en"], ["<|end|>"]) == (["a", "", "<|en"], False)


def test_the_first_of_several_stop_strings_counts() -> None:
    assert run(["one two three"], ["three", "two"]) == (["one "], True)


def test_the_stop_string_may_be_kept() -> None:
    assert run(["one t", "wo three"], ["two"], is_included=True) == (["one ", "two"], True)


def test_a_self_overlapping_stop_string() -> None:
    assert run(["a", "a", "a", "b", "x"], ["aab"]) == (["", "", "a", ""], True)


def test_nothing_comes_after_a_match() -> None:
    stop = StopFilter(["x"])
    assert stop.push("axb") == "a"
    assert stop.push("c") == ""
    assert stop.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopFilter(["a", ""])


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_any_cut_of_a_text(pieces: list[str], stops: list[str]) -> None:
    shown, is_matched = run(pieces, stops)
    text, out = "".join(pieces), "".join(shown)
    assert is_matched == any(stop in text for stop in stops)
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    if is_matched:
        assert any(text.startswith(stop, len(out)) for stop in stops)
    else:
        assert out == text
