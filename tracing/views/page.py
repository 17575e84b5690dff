"""Builds one HTML file that needs nothing else: styles, scripts and data stand in it, and it may load nothing.

The page says so itself, by a content security policy that names its one style sheet and its one script by hash. Text
from a capture reaches the page only as JSON and is drawn as text, so a name cannot become markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

_STYLE = "page.css"
_TEMPLATE = "page.html.j2"


def build_page(title: str, scripts: Sequence[str], data: Any) -> str:
    """A page that runs some of the scripts in `assets`, as one, on some data.

    Args:
        title: of the window.
        scripts: names of files, in the order in which they need each other.
        data: what `json` can write; the scripts find it in `DATA`.
    """
    style = _asset(_STYLE)
    script = "\n".join(_asset(name) for name in scripts)
    return _template().render(
        title=title,
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
        data=Markup(embeddable_json(data)),
    )


def embeddable_json(data: Any) -> str:
    """JSON in which nothing can end or open an element of HTML, whatever the strings in it hold."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _asset(name: str) -> str:
    return (files("llmir_iree.tracing.views") / "assets" / name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(_asset(_TEMPLATE))


def _hash(text: str) -> str:
    """As a content security policy names a text that it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
