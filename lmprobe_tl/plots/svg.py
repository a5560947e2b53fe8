"""A picture as SVG to stand inside an HTML page, whose style sheet gives it its colours."""

from __future__ import annotations

import io
import re
import warnings
from html import escape
from typing import Any
from xml.etree import ElementTree

from lmprobe_tl.plots.look import LOOKS
from lmprobe_tl.report_table import printable

_SVG = "{http://www.w3.org/2000/svg}"
_LEFT_OUT = {f"{_SVG}metadata", f"{_SVG}style", f"{_SVG}title"}
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # None leaves them out


def inline_svg(ax: Any, name: str, label: str) -> str:
    """The figure of these Axes, drawn in the light theme, as an <svg> element. name: begins its ids, which must differ
    within a page; label: what it shows, for who cannot see it.

    Colours are the variables of `colour_variables`; text stays text, in the font of the page. Equal pictures give equal
    text.
    """
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of matplotlib's font; the page has its own
        ax.figure.savefig(buffer, format="svg", transparent=True, metadata=_METADATA)
    root = ElementTree.fromstring(buffer.getvalue())
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": printable(label), "stroke-linejoin": "round"}
    return _written(root, f"{name}-")


def colour_variables(theme: str) -> str:
    """Declarations of the colours of a theme, for a style sheet."""
    return " ".join(f"--{name}: {colour};" for name, colour in _colours(theme).items())


def _colours(theme: str) -> dict[str, str]:
    look = LOOKS[theme]
    series = {f"series-{at}": colour for at, colour in enumerate(look.series)}
    return {"ink": look.ink, "muted": look.muted, "grid": look.grid, "surface": look.surface, **series}


def _written(element: ElementTree.Element, prefix: str) -> str:
    """The element without namespaces, which HTML does not have."""
    if element.tag in _LEFT_OUT:
        return ""
    tag = element.tag.rpartition("}")[2]
    attributes = "".join(
        f' {key.rpartition("}")[2]}="{escape(_attribute(key.rpartition("}")[2], value, prefix))}"'
        for key, value in element.attrib.items()
    )
    inner = escape(element.text.strip("\n") if element.text else "", quote=False) if tag in ("text", "tspan") else ""
    return f"<{tag}{attributes}>{inner}{''.join(_written(child, prefix) for child in element)}</{tag}>"


def _attribute(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return prefix + value
    if key == "href":
        return value.replace("#", f"#{prefix}", 1)
    if key == "aria-label":
        return value
    value = value.replace("url(#", f"url(#{prefix}")
    if key == "style":
        value = re.sub(r"font: (?:[a-z]+ )*([\d.]+px) [^;]*", r"font-size: \1", value)
        value = re.sub(r"font-family: [^;]*;? *", "", value)
        for name, colour in _colours("light").items():
            value = value.replace(colour, f"var(--{name})")
    return value
