"""`lmprobe-tl demo`: the whole job on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from lmprobe_tl.cli.options import hush


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the probe file and the report.")] = Path("lmprobe-demo"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampled text.")] = 0,
) -> None:
    """Fit, evaluate, save, reload, attach and generate with live scores, on the embedded model and without network."""
    console = Console(highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    hush()
    from lmprobe_tl.demo.main_job import run_demo
    from lmprobe_tl.report import write_report
    from lmprobe_tl.terminal.printer import TokenPrinter

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    def show_generation(weights: Any, tokenizer: Any) -> TokenPrinter:
        say("")
        return TokenPrinter(console, weights, tokenizer)

    result = run_demo(out, say=say, show_generation=show_generation, seed=seed)
    report = write_report(result, out / "report.html")
    say("")
    say(f"probe file  {result.probe_file}")
    say(f"report      {report}")
