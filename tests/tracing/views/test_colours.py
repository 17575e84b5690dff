"""The palette of kinds: a name has to be readable on a bar of any of them, and a bar to be seen on the page."""

import re
from importlib.resources import files

import pytest

CSS = (files("llmir_iree.tracing.views") / "assets" / "page.css").read_text(encoding="utf-8")
LIGHT, DARK = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in CSS.split("@media", 2)[:2])
KINDS = [*(f"k{number}" for number in range(8)), "rest"]


def luminance(colour: str) -> float:
    channels = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_readable_and_seen(palette, kind):
    assert contrast(palette[kind], palette["on-bar"]) >= 4.5
    assert contrast(palette[kind], palette["panel"]) >= 3
    assert contrast(palette[kind], palette["sunk"]) >= 3
