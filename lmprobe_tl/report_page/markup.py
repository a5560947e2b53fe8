"""Small pieces of HTML. What is not `Html` already is text from data: escaped, and what no reader can see is spelt out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import TypeAlias

from lmprobe_tl.report_table import printable


class Html(str):
    """Text that is HTML, and so is not escaped again."""


Content: TypeAlias = str | Iterable[str]
# Line ends and tabs have marks of their own; spaces are wide enough to see; joiners are part of how words and emoji look.
_PLAIN_RUN = re.compile("[^\n\t]+")
_KEPT = frozenset("\u00a0\u2002\u2003\u2009\u202f\u3000\u200c\u200d")


def tag(name: str, content: Content = "", **attributes: str | None) -> Html:
    """An element. Attributes of None are left out; '_' in their names stands for '-', and one at the end is dropped."""
    shown = (
        f' {key.rstrip("_").replace("_", "-")}="{escape(printable(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{''.join(shown)}>{joined(content)}</{name}>")


def joined(content: Content) -> Html:
    """Text or pieces of HTML, one after the other."""
    parts = [content] if isinstance(content, str) else content
    return Html("".join(part if isinstance(part, Html) else escape(printable(part), quote=False) for part in parts))


def separated(parts: Sequence[str]) -> list[str]:
    """With commas between them."""
    return [piece for at, part in enumerate(parts) for piece in ((", ", part) if at else (part,))]


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table that scrolls by itself where it is too wide. The first cell of each row is its header."""
    top = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head])) if head else ""
    body = [
        tag("tr", [tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)])
        for first, *rest in rows
    ]  # fmt: skip
    inner = tag("table", [tag("caption", caption), *([top] if top else []), tag("tbody", body)])
    return tag("div", inner, class_="scroll", role="region", aria_label=caption, tabindex="0")


def folded(summary: str, content: Content, *, is_open: bool = False) -> Html:
    """What opens with a click."""
    return tag("details", [tag("summary", summary), joined(content)], open="" if is_open else None)


def visible(text: str) -> Html:
    """The text of a prompt as it is, with marks for line ends and tabs, and what no reader can see spelt out."""
    found = []
    for part in re.findall("\n|\t|[^\n\t]+", text):
        if _PLAIN_RUN.fullmatch(part):
            found += [_run(part)]
        else:
            found.append(tag("span", Html(part), class_="nl" if part == "\n" else "tab"))
    return Html("".join(found))


def _run(text: str) -> Html:
    shown = []
    for hidden, rest in re.findall("([^\x20-\x7e]+)|([\x20-\x7e]+)", text):
        for char in hidden:
            is_seen = char.isprintable() or char in _KEPT
            shown.append(escape(char) if is_seen else tag("span", printable(char), class_="ctl"))
        shown.append(escape(rest, quote=False))
    return Html("".join(shown))
