"""AUROC by layer of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmprobe_tl.errors import InputError
from lmprobe_tl.sweep_result import SweepResult, SweepRow, shown

# Okabe and Ito (2008), told apart with every kind of colour vision; without their yellow, which is pale on white.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_MARKERS = "os^Dv<>"  # of another length than the colours, so that the pairs repeat after 42 lines
_GREY = "#6B6B6B"
_MOST_BANDS = 4  # more of them are a fog
_MOST_NAMES = 24


def pyplot() -> Any:
    """matplotlib.pyplot; InputError that says how to install it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("a plot needs matplotlib: pip install 'lmprobe-tl[plots]'.") from None
    return plt


def plot_sweep(result: SweepResult, path: str | Path | None = None, *, ax: Any = None) -> Any:
    """Validation AUROC by layer, a line for each pooling and classifier; see `SweepResult.plot`."""
    plt = pyplot()
    if ax is None:
        _, ax = plt.subplots(figsize=(9, 4.5), layout="constrained")
    places = _places(result.rows)
    several = len({row.classifier for row in result.rows}) > 1
    kinds = list(dict.fromkeys((row.pooling, row.classifier) for row in result.rows))
    banded = kinds if len(kinds) <= _MOST_BANDS else [(result.best_.pooling, result.best_.classifier)]
    for index, (pooling, classifier) in enumerate(kinds):
        rows = [row for row in result.rows if (row.pooling, row.classifier) == (pooling, classifier)]
        rows.sort(key=lambda row: places[row.hook_point])
        # With one hook point all lines are points above each other: side by side they can be seen.
        shift = 0.0 if len(places) > 1 else 0.1 * (index - len(kinds))
        x = [places[row.hook_point] + shift for row in rows]
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        label = f"{pooling}, {_shortened(classifier)}" if several else pooling
        ax.plot(x, [row.validation.value for row in rows], color=colour, marker=marker, markersize=5, label=label)
        if (pooling, classifier) in banded:
            _draw_band(ax, x, rows, colour)
    ax.axhline(result.baseline.value, color=_GREY, linestyle="--", label="bag of tokens, no model")
    if result.baseline.low is not None:
        ax.axhspan(result.baseline.low, result.baseline.high, color=_GREY, alpha=0.1, linewidth=0)
    _mark_best(ax, result, places[result.best_.hook_point])
    ax.set_ylabel(f"AUROC, {result.level}s")
    bottom = min(ax.get_ylim()[0], result.baseline.value - 0.02)
    if bottom < 0.55:
        ax.axhline(0.5, color=_GREY, linestyle=":", linewidth=1, label="chance")
    ax.set_ylim(bottom, 1.02)
    _label_places(ax, result.rows, places)
    ax.spines[["top", "right"]].set_visible(False)
    which = "bands" if len(banded) == len(kinds) else "the best one's band"
    interval = f"; {which}: {result.test.auroc.confidence:.0%}" if result.best_.validation.low is not None else ""
    ax.set_title(f"Validation on {result.n_selection} prompts, test on {result.n_test} others{interval}", fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if path is not None:
        ax.figure.savefig(path, dpi=150)
    return ax


def _draw_band(ax: Any, x: list[float], rows: Sequence[SweepRow], colour: str) -> None:
    """The intervals of a line, where all of its points have one."""
    low, high = [row.validation.low for row in rows], [row.validation.high for row in rows]
    if None in low:
        return
    if len(x) == 1:
        ax.vlines(x, low, high, color=colour, linewidth=1.5)
    else:
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _shortened(classifier: str) -> str:
    """A pipeline's repr may be longer than the picture is wide."""
    return classifier if len(classifier) <= 40 else classifier[:39] + "…"


def _places(rows: Sequence[SweepRow]) -> dict[str, float]:
    """Where each hook point stands on the x axis: at its layer where each has one of its own, else in order."""
    layers = {row.hook_point: row.layer for row in rows}
    if None not in layers.values() and len(set(layers.values())) == len(layers):
        return {name: float(layer) for name, layer in layers.items() if layer is not None}
    return {name: float(index) for index, name in enumerate(layers)}


def _label_places(ax: Any, rows: Sequence[SweepRow], places: dict[str, float]) -> None:
    kinds = {row.hook_point.rpartition(".")[2] for row in rows}
    if len(kinds) == 1 and all(row.layer == places[row.hook_point] for row in rows):
        ax.set_xlabel(f"layer of {kinds.pop()}")
        if len(places) == 1:
            (layer,) = places.values()
            ax.set_xticks([layer], [f"{layer:g}"])
            ax.set_xlim(layer - 1, layer + 1)
        else:
            ax.xaxis.get_major_locator().set_params(integer=True)
        return
    named = list(places.items())[:: -(-len(places) // _MOST_NAMES)]
    ax.set_xticks([x for _, x in named], [name for name, _ in named], rotation=45, ha="right", fontsize=7)
    if len(places) == 1:
        ax.set_xlim(named[0][1] - 1, named[0][1] + 1)


def _mark_best(ax: Any, result: SweepResult, x: float) -> None:
    test = result.test.auroc
    label = f"best on the test set: {shown(test)}"
    look: dict[str, Any] = {"marker": "*", "markersize": 14, "color": "black", "markeredgecolor": "white"}
    ax.plot([x], [test.value], linestyle="none", zorder=6, label=label, **look)
    if test.low is not None and test.high is not None:
        ax.plot([x, x], [test.low, test.high], color="black", linewidth=1.5, zorder=5)
