"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

_TIMES = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))


def duration(ns: float) -> str:
    """Nanoseconds in the unit that leaves at most four digits, such as "12.3 µs"."""
    factor, unit = next((scale for scale in _TIMES if abs(ns) >= scale[0]), _TIMES[-1])
    return f"{digits(ns / factor)} {unit}"


def percent(share: float) -> str:
    """A share as "12.3%"; with two decimals below ten per cent."""
    return f"{100 * share:.{2 if share and abs(share) < 0.1 else 1}f}%"


def digits(value: float) -> str:
    """About three digits, without zeros at the end of a fraction."""
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def plural(count: int, word: str) -> str:
    """As in "1 call", "1,234 calls" and "2 passes"."""
    ending = "" if count == 1 else "es" if word.endswith(("s", "ch")) else "s"
    return f"{count:,} {word}{ending}"
