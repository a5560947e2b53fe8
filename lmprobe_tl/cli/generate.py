"""`lmprobe-tl generate`: continue a prompt with live scores."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from lmprobe_tl.cli.data_files import read_standard_input
from lmprobe_tl.cli.options import BosOption, ModelOption, ProbeArgument, load_or_demo
from lmprobe_tl.errors import InputError


def generate(
    probe: ProbeArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or - for standard input.")],
    model: ModelOption = None,
    stop: Annotated[bool, typer.Option("--stop", help="End at the first token that reaches the threshold.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Length of the continuation.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy.")] = 0.8,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", min=0, max=1, help="Probability that raises the alarm, instead of the file's."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the text; by default another each time.")] = None,
    bos: BosOption = None,
) -> None:
    """Continue a prompt with every token coloured by its own score, and flagged tokens between marks.

    The alarm watches the running score, which pools the tokens so far as the probe file says; a line below the text shows
    it. In a pipe, with NO_COLOR or with TERM=dumb the text comes without colours.
    """
    from lmprobe_tl.probe_file import load_probe

    weights = load_probe(probe)
    if not weights.is_binary:
        raise InputError(f"probe {weights.name!r} has {len(weights.labels)} classes; a live display needs one with two.")
    if threshold is not None:
        weights = weights.with_threshold(threshold)
    text = read_standard_input() if prompt == "-" else prompt
    loaded = load_or_demo(model)
    import torch

    from lmprobe_tl.generation import monitored_generate
    from lmprobe_tl.terminal.printer import TokenPrinter

    torch.seed() if seed is None else torch.manual_seed(seed)
    sampling: dict[str, Any] = {"temperature": temperature} if temperature > 0 else {"do_sample": False}
    with TokenPrinter(Console(highlight=False), weights, loaded.tokenizer) as printer:
        result = monitored_generate(
            loaded,
            [text],
            [weights],
            max_new_tokens=max_new_tokens,
            stop=stop,
            on_token=printer,
            score_last_token=True,
            prepend_bos=bos,
            **sampling,
        )[0]
        printer.finish(result.stopped_by)
