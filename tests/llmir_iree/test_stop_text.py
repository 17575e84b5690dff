from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmir_iree.stop_text import StopText


def feed(stops: tuple[str, ...], pieces: list[str]) -> tuple[list[str], str, bool]:
    stop_text = StopText(stops)
    shown = [stop_text.push(piece) for piece in pieces]
    return shown, stop_text.flush(), stop_text.found


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ((), ["a", "b"], (["a", "b"], "", False)),
        (("END",), ["a", "b"], (["a", "b"], "", False)),
        (("END",), ["one END two"], (["one "], "", True)),
        (("END",), ["one E", "N", "D two", "x"], (["one ", "", "", ""], "", True)),
        (("END",), ["E", "NEN", "D"], (["", "EN", ""], "", True)),
        (("END",), ["aE", "x"], (["a", "Ex"], "", False)),
        (("END",), ["aEN"], (["a"], "EN", False)),
        (("bcd", "ab"), ["xab", "cd"], (["x", ""], "", True)),
        (("aab",), ["a", "a", "a", "b"], (["", "", "a", ""], "", True)),
    ],
)
def test_text_comes_up_to_the_stop(
    stops: tuple[str, ...], pieces: list[str], expected: tuple[list[str], str, bool]
) -> None:
    assert feed(stops, pieces) == expected


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3).map(tuple),
    st.lists(st.text("abc", max_size=3), max_size=8),
)
def test_no_stop_is_ever_shown(stops: tuple[str, ...], pieces: list[str]) -> None:
    """However the text is cut, what is shown holds no stop string; without one, all is shown."""
    shown, rest, found = feed(stops, pieces)
    text, whole = "".join(shown) + rest, "".join(pieces)
    assert whole.startswith(text)
    assert not any(stop in text for stop in stops)
    assert found == any(stop in whole for stop in stops)
    assert found or text == whole
