"""What the benchmark of probe quality prints: a line a set, the means, and verdicts, all from its JSON result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality_recipes import BASELINE, BY_HAND, CONTROL, MAIN

Result = Mapping[str, Any]

MOST_FROM_BY_HAND = 0.01  # AUROC
MOST_FROM_HUGGING_FACE = 1e-4  # of activations, whose values are about 1
MOST_FROM_SAVED = 1e-3  # of logits
MOST_FROM_CHANCE = 0.05  # mean AUROC of the control over sets

_COLUMNS = 9  # of recipes in a table
_SHORT = {
    BASELINE: "bag",
    BY_HAND: "hand",
    "middle layer": "mid",
    "all layers": "all",
    "mass_mean": "mass",
    "mass_mean_whitened": "mm-w",
    "polynomial": "poly",
    "stacking": "stack",
    "softmax": "softm",
    "windowed": "windo",
    "multimax": "mumax",
    "attention": "attn",
    "rolling_attention": "rolla",
    CONTROL: "shuf",
}


def table(result: Result) -> str:
    """At most 120 columns; recipes for which there is no room are in a second table, and so on.

    The last column is the paired difference of the probe and the bag of words; * where its interval leaves out 0.
    """
    names = [name for name in result["recipes"] if name != MAIN]
    first, *others = [names[start : start + _COLUMNS] for start in range(0, len(names), _COLUMNS)]
    lines = [f"{'set':21} test at {'probe':17} {_head(first)} {'probe - bag':>18}", ""]
    for name, found in result["sets"].items():
        main = found["recipes"][MAIN]
        mark = "*" if verdict_of(main["gain"]) else " "
        start = f"{name[:21]:21} {found['n_test']:4} {found['layer']:2} {_with_interval(main['auroc'])}"
        lines.append(f"{start:47} {_cells(found, first)} {_signed(main['gain'])}{mark}")
    lines += ["", f"{'mean':29} {_plain(float(np.mean(values_of(result, MAIN)))):17} {_means(result, first)}"]
    for more in others:
        lines += ["", f"{'set':21} {_head(more)}", ""]
        lines += [f"{name[:21]:21} {_cells(found, more)}" for name, found in result["sets"].items()]
        lines += ["", f"{'mean':21} {_means(result, more)}"]
    return "\n".join(lines)


def _head(names: Sequence[str]) -> str:
    return " ".join(f"{_SHORT.get(name, name)[:5]:>5}" for name in names)


def _cells(found: Mapping[str, Any], names: Sequence[str]) -> str:
    rows = [found["recipes"].get(name) for name in names]
    return " ".join(f"{_plain(row['auroc']['value']) if row else '-':>5}" for row in rows)


def _means(result: Result, names: Sequence[str]) -> str:
    values = [values_of(result, name) for name in names]
    return " ".join(f"{_plain(float(np.mean(some))) if some else '-':>5}" for some in values)


def _plain(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def _with_interval(auroc: Mapping[str, float]) -> str:
    return f"{_plain(auroc['value'])} [{_plain(auroc['low'])}, {_plain(auroc['high'])}]"


def _signed(gain: Mapping[str, float]) -> str:
    value, low, high = (f"{gain[key]:+.2f}".replace("0.", ".", 1) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def verdict_of(gain: Mapping[str, float]) -> int:
    """1 for more than the baseline, -1 for less, 0 where the interval of the difference holds 0."""
    return int(gain["low"] > 0) - int(gain["high"] < 0)


def values_of(result: Result, recipe: str) -> list[float]:
    return [found["recipes"][recipe]["auroc"]["value"] for found in result["sets"].values() if recipe in found["recipes"]]


def wins(result: Result) -> Iterator[str]:
    """For each recipe: in how many sets it is really above the bag of words, really below, and neither."""
    for recipe in (name for name in result["recipes"] if name != CONTROL):
        gains = [found["recipes"][recipe].get("gain") for found in result["sets"].values() if recipe in found["recipes"]]
        judged = [verdict_of(gain) for gain in gains if gain is not None]
        if judged:
            yield (
                f"{recipe:22} above the bag of words in {judged.count(1)} of {len(judged)} sets, below in "
                f"{judged.count(-1)}, neither in {judged.count(0)}"
            )


def verdicts(result: Result) -> list[dict[str, Any]]:
    """What has to hold: {"what", "found", "bound", "holds"}."""
    sets = result["sets"]
    from_hand = {
        name: abs(found["recipes"][MAIN]["auroc"]["value"] - found["recipes"][BY_HAND]["auroc"]["value"])
        for name, found in sets.items()
    }
    farthest = max(from_hand, key=from_hand.__getitem__)
    checks = [found["checks"] for found in sets.values()]
    measured = [
        (
            f"AUROC of the probe and of scikit-learn by hand differ most on {farthest}",
            from_hand[farthest],
            MOST_FROM_BY_HAND,
        ),
        (
            "activations differ most from Hugging Face's",
            max(one["from_hugging_face"] for one in checks),
            MOST_FROM_HUGGING_FACE,
        ),
        ("logits of text and of stored activations differ most", max(one["from_text"] for one in checks), MOST_FROM_SAVED),
        (
            "mean AUROC of shuffled labels differs from 0.5",
            abs(float(np.mean(values_of(result, CONTROL))) - 0.5),
            MOST_FROM_CHANCE,
        ),
    ]
    return [{"what": what, "found": found, "bound": bound, "holds": found <= bound} for what, found, bound in measured]


def lmprobe_lines(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None:
        return
    error = found["on_minilm"]["error"] or "runs"
    yield f"lmprobe {found['version']} on MiniLM: {error.partition('. ')[0]}"
    for name, row in found["on_the_embedded_model"].items():
        yield (
            f"{name:15} on the embedded model: probe {_with_interval(row['ours'])}, "
            f"lmprobe {_with_interval(row['lmprobe'])}, difference {_signed(row['difference'])}"
        )


def report(result: Result) -> str:
    lines = [table(result), "", *wins(result), ""]
    lines += [
        f"{'holds ' if one['holds'] else 'FAILS '} {one['what']}: {one['found']:.2g}, at most {one['bound']:g}"
        for one in result["verdicts"]
    ]
    return "\n".join([*lines, "", *lmprobe_lines(result["lmprobe"])])
