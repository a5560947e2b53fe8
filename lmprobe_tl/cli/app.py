"""The command `lmprobe-tl`: its subcommands, and how their errors reach the user."""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Any

import typer

from lmprobe_tl.cli.calibrate import calibrate
from lmprobe_tl.cli.demo import demo
from lmprobe_tl.cli.eval import evaluate
from lmprobe_tl.cli.extract import extract, merge
from lmprobe_tl.cli.fit import fit
from lmprobe_tl.cli.generate import generate
from lmprobe_tl.cli.inspect import inspect
from lmprobe_tl.cli.score import score
from lmprobe_tl.cli.serve import serve
from lmprobe_tl.cli.sweep import sweep
from lmprobe_tl.errors import LmprobeError, LmprobeWarning

app = typer.Typer(
    name="lmprobe-tl",
    help="Train probes on a language model's residual stream and score every token live.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(short_help="Run the whole job on the embedded model, without network.")(demo)
for command in (fit, calibrate, score, generate, extract, merge, sweep, inspect):
    app.command()(command)
app.command("eval")(evaluate)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


def main() -> None:
    """Entry point: errors that are the user's to mend are one line on stderr and exit code 2."""
    warnings.showwarning = _one_line_warning  # type: ignore[assignment]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to stop
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except typer.Exit as stop:
        status = stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except (LmprobeError, OSError) as error:
        status = _fail(str(error))
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of the command line's own
            raise
        status = _fail(error.format_message())
    if status == 130:
        print("lmprobe-tl: interrupted", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> int:
    print(f"lmprobe-tl: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    if issubclass(category, LmprobeWarning) or category.__name__ == "ConvergenceWarning":
        print(f"lmprobe-tl: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
