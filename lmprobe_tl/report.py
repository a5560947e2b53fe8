"""One self-contained HTML page of a demo run: metrics with intervals, and generated text coloured by its live scores."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from lmprobe_tl.colours import score_colour
from lmprobe_tl.demo.main_job import DemoResult, interval_text
from lmprobe_tl.generation import GenerationResult
from lmprobe_tl.live.watches import threshold_logit
from lmprobe_tl.probe_file import load_probe
from lmprobe_tl.probe_summary import probe_summary
from lmprobe_tl.token_text import TokenText

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c1c1c; background: #fff; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; }
td, th { padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
pre { background: #fafafa; border: 1px solid #ddd; padding: .75rem; line-height: 1.6;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre .prompt { border-bottom: 1px dotted #888; }
pre .flag { border-bottom: 2px solid #8a4b00; }
.scale span { display: inline-block; padding: 0 .6rem; }
"""


def write_report(result: DemoResult, path: Path) -> Path:
    """Write the page; `path` is replaced if it exists."""
    weights = load_probe(result.probe_file)
    threshold = threshold_logit(weights)
    generations = "\n".join(_generation(shown, weights.name, threshold, result.tokenizer) for shown in result.shown)
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>lmprobe-tl demo</title><style>{_STYLE}</style></head><body>
<h1>Is the text after this token inside a comment or string?</h1>
<p>A linear probe on the residual stream of a {result.training["parameters"] / 1e6:.1f} M parameter Llama that was trained on
the source of Python's standard library. Labels come from Python's own tokenizer, so they are exact, for generated text
too.</p> <h2>How good it is</h2> {_table(_metric_rows(result))} <h2>Live scores while the model generates</h2> <p
class="scale">{_scale(threshold)}</p> <p>Underlined in dots: the prompt. Underlined in brown: at or above the threshold.
Hover over a token for its score.</p> {generations} <h2>The probe file</h2> {_table(list(probe_summary(weights).items()))}
</body></html>
"""
    path.write_text(page, encoding="utf-8")
    return path


def _metric_rows(result: DemoResult) -> list[tuple[str, str]]:
    evaluation, live = result.evaluation, result.live
    rows = [
        ("AUROC of the probe, unseen modules", interval_text(evaluation.auroc)),
        ("AUROC of the token alone (no model)", interval_text(result.identity_auroc)),
        ("Accuracy of the probe", interval_text(evaluation.accuracy)),
        ("AUROC of the live scores, generated text", interval_text(live.probe)),
        ("AUROC of the token alone on that text", interval_text(live.token_identity)),
        ("Tokens judged", f"{evaluation.n_examples:,} in {evaluation.n_prompts} pieces; {live.n_tokens:,} generated"),
    ]
    losses = result.training["validation_loss_nats_per_token"]
    losses_text = ", ".join(f"{name} {losses[name]:.2f}" for name in ("model", "trigram", "unigram"))
    return [*rows, ("Loss of the language model (nats a token)", losses_text)]


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _scale(threshold: float) -> str:
    marks = [(-6, "well below"), (-2, "below"), (0, "threshold"), (2, "above"), (6, "well above")]
    return "".join(f'<span style="background:{score_colour(threshold + at, threshold)}">{name}</span>' for at, name in marks)


def _generation(result: GenerationResult, name: str, threshold: float, tokenizer: Any) -> str:
    spans, tokens = [], TokenText(tokenizer)
    # strict=False: a row may end in a token that was never scored
    for position, (token, logit) in enumerate(zip(result.tokens.tolist(), result.scores[name].tolist(), strict=False)):
        if added := tokens.add(token, logit):
            spans.append(_span(*added, threshold, in_prompt=position < result.prompt_length))
    if added := tokens.rest():
        spans.append(_span(*added, threshold, in_prompt=False))
    return f"<pre>{''.join(spans)}</pre>"


def _span(text: str, logit: float, threshold: float, *, in_prompt: bool) -> str:
    kinds = ["prompt"] * in_prompt + ["flag"] * (logit >= threshold)
    return (
        f'<span class="{" ".join(kinds)}" style="background:{score_colour(logit, threshold)}" '
        f'title="logit {logit:.2f}">{escape(text)}</span>'
    )
