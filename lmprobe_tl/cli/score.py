"""`lmprobe-tl score`: score prompts with a probe file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmprobe_tl.cli.data_files import read_prompts, write_records
from lmprobe_tl.cli.options import (
    BatchOption,
    BosOption,
    ModelOption,
    ProbeArgument,
    check_folder_of,
    load_or_demo,
)
from lmprobe_tl.errors import InputError


def score(
    probe: ProbeArgument,
    prompts: Annotated[
        str, typer.Argument(help="Prompts: .txt (one a line), .jsonl, .csv, or - for lines of standard input.")
    ],
    model: ModelOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write, .jsonl or .csv; by default JSONL to the terminal.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Add the logit of every token (JSONL).")] = False,
    text_column: Annotated[str, typer.Option("--text-column", help="Where the text stands.")] = "text",
    max_tokens_per_batch: BatchOption = None,
    bos: BosOption = None,
) -> None:
    """Score prompts with a probe file."""
    from lmprobe_tl.probe_file import load_probe

    weights = load_probe(probe)
    texts = read_prompts(prompts, text_column)
    if out is not None and out.suffix.lower() not in (".jsonl", ".csv"):
        raise InputError(f"--out is {str(out)!r}; expected a name ending in .jsonl or .csv.")
    if out is not None:
        check_folder_of(out)
    if tokens and out is not None and out.suffix.lower() == ".csv":
        raise InputError("--tokens needs JSONL; name a file ending in .jsonl, or leave --out away.")
    from lmprobe_tl.scoring import score_prompts

    loaded = load_or_demo(model)
    found = score_prompts(loaded, texts, weights, max_tokens_per_batch=max_tokens_per_batch, prepend_bos=bos)[weights.name]
    flagged = [None] * len(texts) if found.flagged is None else found.flagged.tolist()
    rows = zip(texts, found.scores, found.token_logits, flagged, strict=True)
    records = [_score_record(weights, *row) for row in rows]
    if not tokens:
        for record in records:
            del record["token_logits"]
    write_records(records, out)


def _score_record(weights: Any, text: str, score: Any, token_logits: Any, flagged: bool | None) -> dict[str, Any]:
    record: dict[str, Any] = {"text": text, "score": score.tolist()}
    if weights.is_binary:
        from lmprobe_tl.live.reduction import live_reduction

        record |= {"unit": live_reduction(weights).unit, "flagged": flagged}
    else:
        record["label"] = weights.labels[int(score.argmax())]
    return record | {"token_logits": token_logits.tolist()}
