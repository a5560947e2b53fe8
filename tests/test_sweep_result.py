"""What a sweep's result says of itself: a frozen record, a table, a text and a picture."""

from __future__ import annotations

import dataclasses
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from sweep_results import by_layer, result_of

from lmprobe_tl.errors import InputError

PNG = b"\x89PNG\r\n\x1a\n"
TWO = ("last_token", "mean"), ("logistic_regression", "lda")


@pytest.fixture(autouse=True)
def no_window() -> Any:
    mpl.use("agg")
    yield
    sys.modules["matplotlib.pyplot"].close("all") if "matplotlib.pyplot" in sys.modules else None


def test_a_result_cannot_be_changed() -> None:
    result = by_layer([0, 1])
    for record, name in ((result, "rows"), (result.best_, "pooling"), (result.test, "auroc"), (result.baseline, "value")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, None)


def test_the_table_has_a_line_a_combination_and_one_best() -> None:
    result = by_layer([0, 1, 2], *TWO)
    frame = result.to_frame()
    assert list(frame.columns) == ["hook_point", "layer", "pooling", "classifier", "auroc", "low", "high", "is_best"]
    assert len(frame) == len(result.rows) == 12
    assert frame["auroc"].tolist() == [row.validation.value for row in result.rows]
    assert frame["low"].tolist() == [row.validation.low for row in result.rows]
    assert frame["high"].tolist() == [row.validation.high for row in result.rows]
    (best,) = frame[frame["is_best"]].to_dict("records")
    assert (best["hook_point"], best["pooling"]) == (result.best_.hook_point, result.best_.pooling)
    assert best["auroc"] == frame["auroc"].max()
    assert by_layer([0, 1], width=None).to_frame()["low"].isna().all()
    # Two unlike classifiers may have the same repr.
    twins = dataclasses.replace(result, rows=(*result.rows, result.best_))
    assert twins.to_frame()["is_best"].sum() == 1


def test_the_text_ranks_ten_and_says_what_the_best_is_worth() -> None:
    lines = str(by_layer([0, 1, 2], *TWO)).splitlines()
    assert lines[0] == "validation AUROC of 12 combinations on 48 prompts"
    assert lines[1] == "blocks.1.hook_resid_post  last_token  logistic_regression  0.950 [0.900, 1.000]"
    assert lines[2] == "blocks.1.hook_resid_post  last_token  lda                  0.920 [0.870, 0.970]"
    ranked = [float(line.split()[3]) for line in lines[1:11]]
    assert ranked == sorted(ranked, reverse=True)
    assert lines[11:] == [
        "... and 2 more",
        "bag of tokens, no model: 0.700 [0.650, 0.750]",
        "test AUROC of the best on 16 other prompts: 0.900 [0.850, 0.950]",
        "bag of tokens there: 0.700 [0.650, 0.750]",
    ]
    short = str(by_layer([0], baseline_test=0.89, width=None)).splitlines()
    assert short[1] == "blocks.0.hook_resid_post  mean  logistic_regression  0.950"
    assert short[-1] == "bag of tokens there: 0.890  (the probe does not clearly beat it)"


@pytest.mark.parametrize(
    ("baseline_test", "width", "beats"), [(0.7, 0.05, True), (0.86, 0.05, False), (0.95, 0.05, False), (0.1, None, False)]
)
def test_a_bag_of_tokens_is_beaten_above_its_interval_alone(baseline_test: float, width: float | None, beats: bool) -> None:
    result = by_layer([0], test=0.9, baseline_test=baseline_test, width=width)
    assert result.beats_baseline is beats


# --- pictures ------------------------------------------------------------------------------------------------------------


def lines_of(ax: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


def test_the_picture_shows_each_line_with_its_band_the_baseline_and_the_best(tmp_path: Path) -> None:
    result = by_layer(list(range(6)), *TWO)
    ax = result.plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(PNG)
    lines = lines_of(ax)
    kinds = [f"{pooling}, {classifier}" for pooling in TWO[0] for classifier in TWO[1]]
    star = "best on the test set: 0.900 [0.850, 0.950]"
    assert list(lines) == [*kinds, "bag of tokens, no model", star]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(lines)
    for kind in kinds:
        rows = [row for row in result.rows if f"{row.pooling}, {row.classifier}" == kind]
        assert lines[kind].get_xdata().tolist() == [row.layer for row in rows] == list(range(6))
        assert lines[kind].get_ydata().tolist() == [row.validation.value for row in rows]
    assert (lines[star].get_xdata()[0], lines[star].get_ydata()[0]) == (result.best_.layer, 0.9)
    assert len(ax.collections) == 4
    for band, kind in zip(ax.collections, kinds, strict=True):
        low, high = band.get_datalim(ax.transData).intervaly
        assert low == pytest.approx(min(lines[kind].get_ydata()) - 0.05)
        assert high == pytest.approx(max(lines[kind].get_ydata()) + 0.05)
    assert ax.get_xlabel() == "layer of hook_resid_post" and ax.get_ylabel() == "AUROC, prompts"
    assert ax.get_title() == "Validation on 48 prompts, test on 16 others; bands: 95%"


def test_axes_of_ones_own_are_drawn_on() -> None:
    import matplotlib.pyplot as plt

    _, own = plt.subplots()
    assert by_layer([0, 1]).plot(ax=own) is own
    assert "mean" in lines_of(own)
    assert len(plt.get_fignums()) == 1


def test_many_lines_look_unlike_each_other_and_only_the_best_has_a_band() -> None:
    result = by_layer([0, 1, 2], ("last_token", "mean", "first_token", "eos"), ("ridge", "lda", "mass_mean"))
    ax = result.plot()
    looks = [
        (line.get_color(), line.get_marker()) for line in lines_of(ax).values() if line.get_marker() not in ("None", "*")
    ]
    assert len(set(looks)) == len(looks) == 12
    assert len(ax.collections) == 1
    assert ax.get_title().endswith("the best one's band: 95%")


def test_one_layer_shows_its_intervals_side_by_side() -> None:
    ax = by_layer([3], *TWO).plot()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["3"]
    places = [line.get_xdata()[0] for line in lines_of(ax).values() if len(line.get_xdata()) == 1]
    assert len(set(places)) == len(places) == 5
    assert len(ax.collections) == 4


def test_without_intervals_there_are_points_alone() -> None:
    ax = by_layer([0, 1, 2], width=None, baseline=0.5).plot()
    assert not ax.collections and not ax.patches
    assert "best on the test set: 0.900" in lines_of(ax)
    assert lines_of(ax)["chance"].get_ydata()[0] == 0.5
    assert ax.get_title() == "Validation on 48 prompts, test on 16 others"


def test_hook_points_without_a_layer_of_their_own_stand_in_order_under_their_names() -> None:
    names = [("embed.hook_out", None), *((f"blocks.0.hook_resid_{kind}", 0) for kind in ("pre", "mid", "post"))]
    ax = result_of({(*name, "mean", "ridge"): 0.6 + 0.1 * at for at, name in enumerate(names)}).plot()
    assert [label.get_text() for label in ax.get_xticklabels()] == [name for name, _ in names]
    assert lines_of(ax)["mean"].get_xdata().tolist() == [0, 1, 2, 3]
    many = [(f"blocks.{layer}.hook_resid_{kind}", layer) for layer in range(40) for kind in ("pre", "post")]
    ax = result_of({(*name, "mean", "ridge"): 0.6 + 0.004 * at for at, name in enumerate(many)}).plot()
    assert 12 <= len(ax.get_xticklabels()) <= 24, "more names would lie on each other"


@pytest.mark.parametrize("result", [by_layer(list(range(48))), by_layer([0]), by_layer(list(range(6)), *TWO)])
def test_no_label_lies_on_another_and_none_is_cut_off(result: Any) -> None:
    ax = result.plot()
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
    inside = [box for box in boxes if ax.bbox.x0 - 20 <= box.x0 and box.x1 <= ax.bbox.x1 + 20]
    assert all(left.x1 < right.x0 for left, right in pairwise(inside))
    legend, whole = ax.get_legend().get_window_extent(), ax.figure.bbox
    assert legend.x0 >= ax.bbox.x1 and legend.x1 <= whole.x1 and legend.y0 >= whole.y0 and legend.y1 <= whole.y1


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = np.array(mpl.colors.to_rgb(colour))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_every_line_can_be_seen_on_white() -> None:
    ax = by_layer([0, 1], ("last_token", "mean", "first_token", "eos"), ("ridge", "lda")).plot()
    contrast = [1.05 / (luminance(line.get_color()) + 0.05) for line in lines_of(ax).values()]
    assert min(contrast) > 2


# --- without the packages that draw --------------------------------------------------------------------------------------


def test_what_is_not_installed_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = by_layer([0, 1])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"a table needs pandas: pip install 'lmprobe-tl\[plots\]'"):
        result.to_frame()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(InputError, match=r"a plot needs matplotlib: pip install 'lmprobe-tl\[plots\]'"):
        result.plot()
    assert "validation AUROC of 2 combinations" in str(result), "the text needs neither"
