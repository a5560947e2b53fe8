"""`lmprobe-tl calibrate`: set a probe file's threshold on files of text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmprobe_tl.cli.data_files import read_prompts
from lmprobe_tl.cli.options import (
    BatchOption,
    BosOption,
    EngineArgsOption,
    EngineOption,
    ModelOption,
    ProbeArgument,
    check_engine_options,
    check_folder_of,
    opened,
)
from lmprobe_tl.errors import InputError

if TYPE_CHECKING:
    from lmprobe_tl.weights import ProbeWeights


def calibrate(
    probe: ProbeArgument,
    negatives: Annotated[
        str, typer.Argument(help="Harmless texts, one a sequence: .txt (one a line), .jsonl, .csv, or - for standard input.")
    ],
    positives: Annotated[
        str | None, typer.Option("--positives", help="Texts with what the probe looks for, to report its recall.")
    ] = None,
    fpr: Annotated[float, typer.Option("--fpr", help="Share of harmless sequences that may raise a false alarm.")] = 0.01,
    delta: Annotated[float, typer.Option("--delta", help="pac: the chance that more do is at most this.")] = 0.05,
    method: Annotated[
        str, typer.Option("--method", help="pac, conformal (holds on average) or empirical (no promise for new text).")
    ] = "pac",
    min_recall: Annotated[
        float | None, typer.Option("--min-recall", help="Fail where the recall on --positives is lower.")
    ] = None,
    probability: Annotated[
        bool, typer.Option("--probability", help="Fit calibrated probabilities too (needs --positives).")
    ] = False,
    model: ModelOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Probe file to write; by default back into PROBE.")] = None,
    text_column: Annotated[str, typer.Option("--text-column", help="Where the text stands.")] = "text",
    max_tokens_per_batch: BatchOption = None,
    bos: BosOption = None,
    engine: EngineOption = "transformer_lens",
    engine_args: EngineArgsOption = None,
) -> None:
    """Set the threshold of a probe file for live use, with a stated guarantee on false alarms."""
    target = probe if out is None else out
    if target.suffix != ".safetensors":
        raise InputError(f"--out is {str(target)!r}; a probe file ends in .safetensors.")
    check_folder_of(target)
    if negatives == positives == "-":
        raise InputError("negatives and --positives both read standard input; give one of them as a file.")
    from lmprobe_tl.live.calibration import CalibrationGoal, calibrate_probe
    from lmprobe_tl.probe_file import load_probe

    # Everything that can fail without the model does so before it is loaded.
    weights, goal = load_probe(probe), CalibrationGoal(fpr, delta, method, min_recall, probability)
    texts = read_prompts(negatives, text_column)
    positive_texts = None if positives is None else read_prompts(positives, text_column)
    goal.check(weights, texts, positive_texts)
    arguments = check_engine_options(engine, engine_args, max_tokens_per_batch)
    with opened(model, engine, arguments, "ProbedLLM", probes=[weights]) as loaded:
        calibrated = calibrate_probe(
            loaded,
            weights,
            texts,
            fpr,
            delta,
            engine=engine,  # type: ignore[arg-type]
            method=method,
            positive_prompts=positive_texts,
            min_recall=min_recall,
            probability=probability,
            max_tokens_per_batch=max_tokens_per_batch,
            prepend_bos=bos,
        )
    print(f"{calibrated.save(target)}: probe {calibrated.name!r}, calibrated", *_lines(calibrated), sep="\n")


def _lines(weights: ProbeWeights) -> list[str]:
    threshold, curve = weights.threshold, weights.spec.probability_calibration
    assert threshold is not None
    lines = [
        f"threshold: {threshold.unit} >= {threshold.value:g} ({threshold.statistic})",
        f"method: {threshold.method} (just above rank {threshold.rank} of {threshold.n} negative sequences in rising order)",
        f"guarantee: {threshold.guarantee}",
    ]
    from lmprobe_tl.probe_spec import RECALL_METRIC

    recall = weights.spec.metrics.get(RECALL_METRIC)
    if recall is not None:
        interval = f"[{recall.low:.3f}, {recall.high:.3f}]"
        lines.append(f"recall: {recall.value:.3f} {interval} on {recall.n} positive sequences")
    if curve is not None:
        lines.append(
            f"probability: sigmoid({curve.slope:g} z {curve.intercept:+g}) of the running maximum's logit z, "
            f"log loss {curve.log_loss_before:.3f} before and {curve.log_loss_after:.3f} after"
        )
    return lines
