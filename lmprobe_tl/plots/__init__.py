"""Pictures of evaluations and sweeps, drawn with matplotlib, which is imported when the first is asked for.

Each takes Axes to draw on, or makes a figure of its own, and returns the Axes; `ax.figure` is the whole picture. All but
`plot_sweep` make a `Figure` that no window and no pyplot knows of.
"""

from __future__ import annotations

from lmprobe_tl.plots.curves import plot_precision_recall, plot_roc
from lmprobe_tl.plots.lengths import plot_lengths
from lmprobe_tl.plots.scores import plot_reliability, plot_scores
from lmprobe_tl.plots.sweep import plot_sweep

__all__ = ["plot_lengths", "plot_precision_recall", "plot_reliability", "plot_roc", "plot_scores", "plot_sweep"]
