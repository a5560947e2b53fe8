"""Pictures of evaluations: their points are those of independent references, and odd data are drawn or named."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from evaluation_reports import noisy, report_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_curve, roc_auc_score, roc_curve
from test_colours import contrast

from lmprobe_tl.bootstrap import Resamples
from lmprobe_tl.errors import InputError
from lmprobe_tl.metrics import calibration_error, tpr_at_fpr
from lmprobe_tl.plots import plot_lengths, plot_precision_recall, plot_reliability, plot_roc, plot_scores
from lmprobe_tl.plots.lengths import length_bins
from lmprobe_tl.plots.look import LOOKS
from lmprobe_tl.plots.scores import wilson_interval
from lmprobe_tl.plots.svg import inline_svg

PLOTS = [plot_roc, plot_precision_recall, plot_scores, plot_reliability, plot_lengths]
Plot = Callable[..., Any]
tied = st.lists(st.tuples(st.integers(0, 1), st.integers(-6, 6)), min_size=4, max_size=40).filter(
    lambda pairs: len({label for label, _ in pairs}) == 2
)


def line(ax: Any, starts: str) -> Any:
    (found,) = [one for one in ax.get_lines() if one.get_label().startswith(starts)]
    return found


def legend(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


@settings(max_examples=15)
@given(tied)
def test_roc_and_precision_recall_have_the_points_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    labels, scores = (np.array(column) for column in zip(*pairs, strict=True))
    report = report_of(labels, scores)
    drawn = line(plot_roc(report), "probe")
    wrong, right, _ = roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(drawn.get_xdata(), wrong)
    np.testing.assert_allclose(drawn.get_ydata(), right)
    drawn = line(plot_precision_recall(report), "probe")
    precision, recall, _ = precision_recall_curve(labels, scores)
    np.testing.assert_allclose(drawn.get_xdata(), recall)
    np.testing.assert_allclose(drawn.get_ydata(), precision)


def test_the_roc_has_a_logarithmic_axis_controls_and_the_rates_of_the_record() -> None:
    labels, scores = noisy(400)
    controls = {"bag_of_words": noisy(400, 1, 4.0)[1], "length": noisy(400, 2, 9.0)[1], "shuffled_labels": [scores, scores]}
    report = report_of(labels, scores, controls=controls)
    ax = plot_roc(report)
    assert ax.get_xscale() == "log" and ax.get_xlim() == (0.001, 1.0)
    for name, words in (("bag_of_words", "bag of words 0."), ("length", "length 0.")):
        wrong, right, _ = roc_curve(labels, controls[name], drop_intermediate=False)
        drawn = line(ax, words)
        np.testing.assert_allclose(drawn.get_xdata(), wrong)
        np.testing.assert_allclose(drawn.get_ydata(), right)
        assert drawn.get_linewidth() < line(ax, "probe").get_linewidth()
    assert not [words for words in legend(ax) if words.startswith("shuffled")]
    rate = report.metrics["tpr_at_fpr_0.01"]
    point = line(ax, "TPR")
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (0.01, rate.value)
    assert f"TPR {rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}] at 1 %" in legend(ax)
    auroc = report.metrics["auroc"]
    assert f"probe {auroc.value:.3f} [{auroc.low:.3f}, {auroc.high:.3f}]" in legend(ax)
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0.1 %", "1 %", "10 %", "100 %"]
    styles = {(one.get_color(), one.get_linestyle()) for one in ax.get_lines()}
    assert len(styles) == len(ax.get_lines())


def test_the_band_is_that_of_a_plain_loop_over_resamples() -> None:
    rng = np.random.default_rng(3)
    prompts = np.repeat(np.arange(24), 3)
    labels, scores = (prompts + rng.integers(0, 2, 72)) % 2, rng.integers(-4, 5, 72) / 2
    report = report_of(labels, scores, prompts=prompts, level="token")
    ax = plot_roc(report)
    (band,) = [one for one in ax.collections if one.get_label() == "95 % interval of the probe"]
    corners = band.get_paths()[0].vertices
    resamples = Resamples.drawn(labels, prompts, n_bootstrap=report.n_bootstrap, random_state=0)
    for rate in corners[[*range(1, 80, 13), 80], 0]:
        values = [
            tpr_at_fpr(labels, scores, rate, sample_weight=times[prompts].astype(float))
            for times, usable in zip(resamples.times, resamples.usable, strict=True)
            if usable
        ]
        low, high = np.quantile(values, [0.025, 0.975])
        np.testing.assert_allclose(sorted(set(corners[corners[:, 0] == rate][:, 1])), sorted({low, high}))


def test_many_controls_are_lines_that_differ() -> None:
    labels, scores = noisy()
    report = report_of(labels, scores, controls={f"control_{at}": noisy(seed=at)[1] for at in range(6)})
    for plot in (plot_roc, plot_precision_recall):
        lines = plot(report).get_lines()
        assert len({(one.get_color(), one.get_linestyle(), one.get_marker()) for one in lines}) == len(lines)


def test_histograms_hold_all_of_each_class() -> None:
    labels, scores = noisy()
    ax = plot_scores(report_of(labels, scores), threshold=1.25)
    outlines = [patch for patch in ax.patches if not patch.get_fill()]
    assert len(outlines) == 2
    for patch in outlines:
        x, y = patch.get_xy().T
        widths = np.diff(np.unique(np.round(x, 9)))
        steps = dict(zip(np.round(x[:-1], 9), y[1:], strict=True))
        assert len(widths) >= 8 and sum(steps[at] for at in sorted(steps)[:-1]) == pytest.approx(1.0)
    assert legend(ax)[:2] == ["'no': 30 prompts", "'yes': 30 prompts"]
    assert line(ax, "'yes' is said").get_xdata() == [0.0, 0.0]
    assert line(ax, "the file's threshold, 1.25").get_xdata() == [1.25, 1.25]


def test_a_few_far_scores_leave_the_others_to_be_seen() -> None:
    labels, scores = noisy()
    scores[0] = -150.0
    ax = plot_scores(report_of(labels, scores))
    assert ax.get_xlim()[0] > -60 and "and beyond" in ax.get_xlabel()
    assert "and beyond" not in plot_scores(report_of(*noisy())).get_xlabel()


@settings(max_examples=15)
@given(tied)
def test_the_reliability_diagram_shows_the_calibration_error(pairs: list[tuple[int, int]]) -> None:
    labels, scores = (np.array(column) for column in zip(*pairs, strict=True))
    report = report_of(labels, scores)
    drawn = line(plot_reliability(report), "share of")
    chance = np.array(report.examples.probabilities[0])
    # Bins of equal mass: a run of equal chances goes where its middle falls.
    bins = [int(((chance < one).sum() + (chance == one).sum() / 2) * 10 / len(chance)) for one in chance]
    parts = [np.array(bins) == at for at in sorted(set(bins))]
    np.testing.assert_allclose(drawn.get_xdata(), [chance[part].mean() for part in parts])
    np.testing.assert_allclose(drawn.get_ydata(), [labels[part].mean() for part in parts])
    gaps = np.abs(drawn.get_ydata() - drawn.get_xdata()) @ [part.mean() for part in parts]
    assert gaps == pytest.approx(calibration_error(labels, chance))


def test_intervals_of_shares_are_wilsons() -> None:
    for right, n in ((0, 5), (3, 10), (10, 10), (77, 130)):
        low, high = wilson_interval(np.array([right / n]), np.array([n]), 0.9)
        expected = binomtest(right, n).proportion_ci(0.9, method="wilson")
        assert (low[0], high[0]) == pytest.approx((expected.low, expected.high))


def test_tokens_of_one_prompt_are_one_in_the_reliability_diagram() -> None:
    labels, scores = noisy(40)

    def width(prompts: Any) -> float:
        (lines,) = plot_reliability(report_of(labels, scores, prompts=prompts, level="token")).collections
        return float(np.mean([np.ptp(path[:, 1]) for path in lines.get_segments()]))

    assert width(np.arange(40) // 20) > width(np.arange(40))


def test_auroc_by_length_is_that_of_each_bin() -> None:
    labels, scores = noisy(60)
    n_tokens = [3 + at // 6 for at in range(60)]
    ax = plot_lengths(report_of(labels, scores, n_tokens=n_tokens))
    points = [one.get_ydata()[0] for one in ax.get_lines() if one.get_marker() == "o"]
    assert points == pytest.approx([roc_auc_score(labels[at : at + 12], scores[at : at + 12]) for at in range(0, 60, 12)])
    assert [text.get_text() for text in ax.get_xticklabels()] == [f"{3 + at} to {4 + at}\nn 12" for at in range(0, 10, 2)]
    one_class = plot_lengths(report_of(labels, scores, n_tokens=[3 + label for label in labels]))
    assert [text.get_text() for text in one_class.texts] == ["one class", "one class"]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 7))
def test_bins_of_length_part_the_prompts_and_never_equal_lengths(lengths: list[int], n_bins: int) -> None:
    bins = length_bins(np.array(lengths), n_bins)
    assert (np.sum(bins, axis=0) == 1).all() and all(one.any() for one in bins) and len(bins) <= n_bins
    assert all(not set(np.array(lengths)[one]) & set(np.array(lengths)[~one]) for one in bins)


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("theme", LOOKS)
@pytest.mark.parametrize("scores", [[0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [-104.0, 17.3], [0.5, -0.5, 0.5]])
def test_tiny_and_tied_data_are_drawn(plot: Plot, theme: Any, scores: list[float]) -> None:
    report = report_of([at % 2 for at in range(len(scores))], scores, n_tokens=[4] * len(scores))
    ax = plot(report, theme=theme)
    assert inline_svg(ax, "a", "b").startswith("<svg")
    assert ax.figure.get_facecolor()[0] == pytest.approx(int(LOOKS[theme].surface[1:3], 16) / 255)


@pytest.mark.parametrize("plot", PLOTS)
def test_what_cannot_be_drawn_is_named(plot: Plot, monkeypatch: pytest.MonkeyPatch) -> None:
    two = report_of(*noisy(), n_tokens=[3] * 60)
    with pytest.raises(InputError, match="needs both classes; no prompt is of class 'no'"):
        plot(report_of([1, 1, 1], [0.1, 0.2, 0.3]))
    with pytest.raises(InputError, match="is of two classes; this report has 3"):
        plot(report_of([0, 1, 2] * 6, np.eye(3)[[0, 1, 2] * 6], classes=("a", "b", "c")))
    with pytest.raises(InputError, match="theme is 'blue'; expected 'light' or 'dark'"):
        plot(two, theme="blue")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"a plot needs matplotlib: pip install 'lmprobe-tl\[plots\]'"):
        plot(two)


def test_lengths_that_are_not_known_and_bins_that_are_none_are_named() -> None:
    with pytest.raises(InputError, match="needs the number of tokens of each prompt"):
        plot_lengths(report_of(*noisy()))
    with pytest.raises(InputError, match="n_bins is 0; expected 1 or more"):
        plot_lengths(report_of(*noisy(), n_tokens=[3] * 60), n_bins=0)


def test_axes_of_ones_own_are_drawn_on_and_pyplot_learns_of_no_other() -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    own = mpl.figure.Figure().subplots(1, len(PLOTS))
    report = report_of(*noisy(), n_tokens=[3] * 60)
    for plot, ax in zip(PLOTS, own, strict=True):
        assert plot(report, ax) is ax and ax.get_lines()
        assert plot(report).figure is not ax.figure
    assert plt.get_fignums() == before


@pytest.mark.parametrize("label", ["$x_1$", r"\frac{$", "_hidden", "a\x07\u202eb", "日本語" * 30, "<b>&'\"", "#0072b2"])
def test_classes_are_shown_as_they_are(label: str) -> None:
    classes = ("no", label)
    for plot in PLOTS:
        svg = inline_svg(plot(report_of(*noisy(20), classes=classes, n_tokens=[3] * 20)), "n", label)
        root = ElementTree.fromstring(svg)
        assert not {char for text in root.itertext() for char in text if not (char.isprintable() or char == "\n")}
    texts = legend(plot_scores(report_of(*noisy(20), classes=classes)))
    shown = f"'{15 * '日本語'[:3]}"[:16] + "…" if "日" in label else repr(label)
    assert texts[1].replace(r"\$", "$") == f"{shown}: 10 prompts"
    svg = inline_svg(plot_scores(report_of(*noisy(20), classes=classes)), "n", label)
    assert f"{shown}: 10 prompts" in list(ElementTree.fromstring(svg).itertext())


def test_an_inline_svg_has_colours_of_the_page_alone_and_is_the_same_each_time() -> None:
    report = report_of(*noisy(), n_tokens=[3] * 60, controls={"length": noisy(seed=3)[1]})
    for plot in PLOTS:
        svg = inline_svg(plot(report), "one", "what it shows")
        assert svg == inline_svg(plot(report), "one", "what it shows")
        root = ElementTree.fromstring(svg)
        assert root.attrib["role"] == "img" and root.attrib["aria-label"] == "what it shows"
        styles = " ".join(element.attrib.get("style", "") for element in root.iter())
        assert "#" not in styles.replace("url(#", "") and "var(--ink)" in styles and "font-family" not in styles
        ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert len(set(ids)) == len(ids) and all(one.startswith("one-") for one in ids)
        uses = {element.attrib["href"] for element in root.iter() if "href" in element.attrib}
        assert uses <= {f"#{one}" for one in ids}
        assert not {element.tag for element in root.iter()} - {"svg", "g", "path", "text", "use", "defs", "clipPath", "rect"}


@pytest.mark.parametrize("theme", LOOKS)
def test_text_and_lines_stand_out(theme: str) -> None:
    look = LOOKS[theme]
    for colour in (look.ink, look.muted):
        assert contrast(colour, look.surface) >= 4.5
    for colour in look.series:
        assert contrast(colour, look.surface) >= 3.0
    everything = [look.ink, look.muted, look.grid, look.surface, *look.series]
    assert len(set(everything)) == len(everything)
