"""What a sweep found, as a frozen record: every combination with its interval, and the best one judged on a test set."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmprobe_tl.errors import InputError
from lmprobe_tl.evaluation import Evaluation
from lmprobe_tl.metrics import Interval

_SHOWN_ROWS = 10


@dataclass(frozen=True)
class SweepRow:
    """One combination. validation: AUROC on prompts that it was not fitted on, the mean over folds, with its interval."""

    hook_point: str
    layer: int | None
    pooling: str
    classifier: str
    validation: Interval


@dataclass(frozen=True)
class SweepResult:
    """Every combination of a sweep, in the order in which they were tried.

    best_: the row with the highest validation AUROC, the first of equals. That score is the maximum of many, and so it
    flatters; `test` is the evaluation of the same combination, fitted on all selection prompts, on prompts that chose
    nothing. baseline, baseline_test: AUROC of a bag of tokens, without a model, on the same splits.
    probe_: the best combination as a fitted Probe, to save or attach. level: 'prompt', or 'token' where each token is an
    example. n_selection, n_test: prompts in either part.
    """

    rows: tuple[SweepRow, ...]
    best_: SweepRow
    test: Evaluation
    baseline: Interval
    baseline_test: Interval
    level: str
    validation: int | float
    n_selection: int
    n_test: int
    random_state: int | None
    probe_: Any = field(repr=False, compare=False)

    @property
    def beats_baseline(self) -> bool:
        """Whether the best is above the bag of tokens on the test set, by more than the baseline's interval."""
        high = self.baseline_test.high
        return high is not None and self.test.auroc.value > high

    def to_frame(self) -> Any:
        """A pandas DataFrame, one line a combination: hook_point, layer, pooling, classifier, auroc, low, high, is_best.

        InputError where pandas is not installed.
        """
        pd = pandas()
        best = self.rows.index(self.best_)  # the first of equals, which two unlike classifiers with one repr can be
        return pd.DataFrame([_line(row, is_best=index == best) for index, row in enumerate(self.rows)])

    def plot(self, path: str | Path | None = None, *, ax: Any = None) -> Any:
        """Validation AUROC by layer, the baseline, and the best on the test set. Returns matplotlib's Axes.

        Up to four lines have bands, their intervals; of more lines the best one alone. path: also write the picture there.
        ax: Axes to draw on. InputError where matplotlib is not installed.
        """
        from lmprobe_tl.plots.sweep import plot_sweep

        return plot_sweep(self, path, ax=ax)

    def __str__(self) -> str:
        ranked = sorted(self.rows, key=lambda row: -row.validation.value)
        top = ranked[:_SHOWN_ROWS]
        words = [(row.hook_point, row.pooling, row.classifier) for row in top]
        widths = [max(map(len, column)) for column in zip(*words, strict=True)]
        lines = [
            "  ".join([*(f"{word:<{width}}" for word, width in zip(named, widths, strict=True)), shown(row.validation)])
            for named, row in zip(words, top, strict=True)
        ]
        more = [f"... and {len(ranked) - _SHOWN_ROWS} more"] if len(ranked) > _SHOWN_ROWS else []
        verdict = "" if self.beats_baseline else "  (the probe does not clearly beat it)"
        return "\n".join(
            [
                f"validation AUROC of {len(ranked)} combinations on {self.n_selection} prompts",
                *lines,
                *more,
                f"bag of tokens, no model: {shown(self.baseline)}",
                f"test AUROC of the best on {self.n_test} other prompts: {shown(self.test.auroc)}",
                f"bag of tokens there: {shown(self.baseline_test)}{verdict}",
            ]
        )


def pandas() -> Any:
    """The package; InputError that says how to install it."""
    try:
        import pandas as pd
    except ImportError:
        raise InputError("a table needs pandas: pip install 'lmprobe-tl[plots]'.") from None
    return pd


def _line(row: SweepRow, *, is_best: bool) -> dict[str, Any]:
    interval = row.validation
    named = {name: value for name, value in asdict(row).items() if name != "validation"}
    return named | {"auroc": interval.value, "low": interval.low, "high": interval.high, "is_best": is_best}


def shown(interval: Interval) -> str:
    """'0.912 [0.890, 0.930]', without the interval where the data are too few for one."""
    band = "" if interval.low is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
    return f"{interval.value:.3f}{band}"
