"""How all pictures look: colours of the light and the dark theme, axes, labels, and text that comes from data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lmprobe_tl.errors import InputError
from lmprobe_tl.report_table import columns, printable

Theme: TypeAlias = Literal["light", "dark"]
FONT_SIZE = 9.0  # points, in a picture as wide as a phone
SMALL = 7.5
_WIDTH, _HEIGHT = 4.6, 3.3  # inches, without a legend
_LEGEND_LINE = 0.16  # inches
_BELOW = 40  # points from the axes to the legend, where ticks and label are
_LONGEST = 32


@dataclass(frozen=True)
class Look:
    """Colours of a theme, '#rrggbb', all different. ink: text and axes; muted: what stands behind; series: of the lines."""

    ink: str
    muted: str
    grid: str
    surface: str
    series: tuple[str, ...]


# After Okabe and Ito (2008), told apart with every kind of colour vision; lines differ in style, too.
LOOKS: dict[str, Look] = {
    "light": Look("#1c1c1c", "#666666", "#d8d8d8", "#fefefe", ("#0072b2", "#d55e00", "#007a5a", "#b0508a", "#a06d00")),
    "dark": Look("#ececec", "#a9a9a9", "#444444", "#17181a", ("#56b4e9", "#f28a3c", "#2fc79b", "#e39cc7", "#e8b93e")),
}
LINE_STYLES = ("-", "--", "-.", ":")


def plot_axes(ax: Any, theme: Theme, n_lines: int) -> tuple[Any, Look]:
    """Axes to draw on, for None new ones in a figure of their own with room for a legend of `n_lines`, and the theme's look.

    InputError for an unknown theme, and where matplotlib is not installed.
    """
    if theme not in LOOKS:
        raise InputError(f"theme is {theme!r}; expected {' or '.join(map(repr, LOOKS))}.")
    look = LOOKS[theme]
    if ax is None:
        ax = new_figure(_HEIGHT + _LEGEND_LINE * n_lines, facecolor=look.surface).add_subplot()
    ax.set_facecolor(look.surface)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(look.muted)
    ax.tick_params(which="both", color=look.muted, labelcolor=look.ink, labelsize=FONT_SIZE)
    ax.set_axisbelow(True)
    return ax, look


def new_figure(height: float, **options: Any) -> Any:
    """A matplotlib Figure; InputError that says how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("a plot needs matplotlib: pip install 'lmprobe-tl[plots]'.") from None
    return Figure(figsize=(_WIDTH, height), layout="constrained", **options)


def label_axes(ax: Any, look: Look, title: str, x: str, y: str) -> None:
    ax.set_title(plain(title, 60), fontsize=FONT_SIZE + 1, color=look.ink, loc="left")
    ax.set_xlabel(plain(x, 80), fontsize=FONT_SIZE, color=look.ink)
    ax.set_ylabel(plain(y, 80), fontsize=FONT_SIZE, color=look.ink)


def add_legend(ax: Any, look: Look) -> None:
    """Below the axes and their labels, where no line can run through it."""
    below = _transforms().ScaledTranslation(0.0, -_BELOW / 72, ax.figure.dpi_scale_trans)
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.02, 0.0), "bbox_transform": ax.transAxes + below}
    ax.legend(frameon=False, fontsize=SMALL + 0.5, labelcolor=look.ink, handlelength=2.4, borderaxespad=0.0, **place)


def percent_ticks(axis: Any, places: Sequence[float] | None = None) -> None:
    """Shares as percentages, at these places or where matplotlib puts them."""
    if places is not None:
        axis.set_major_locator(_ticker().FixedLocator(list(places)))
    axis.set_major_formatter(_ticker().FuncFormatter(lambda share, _: f"{100 * share:.6g} %"))
    axis.set_minor_formatter(_ticker().NullFormatter())


def plain(text: str, longest: int = _LONGEST) -> str:
    """Text for matplotlib that is shown as it is: no formulas between dollars, nothing unseen, nothing that runs out of
    the picture."""
    text = printable(text)
    if columns(text) > longest:
        while columns(text) > longest - 1:
            text = text[:-1]
        text += "…"
    return text.replace("$", r"\$")


def quoted(label: object, longest: int = _LONGEST) -> str:
    """A class as a legend names it; quoted, since matplotlib leaves out what begins with '_'."""
    return plain(repr(label), longest)


def _transforms() -> Any:
    from matplotlib import transforms

    return transforms


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker
