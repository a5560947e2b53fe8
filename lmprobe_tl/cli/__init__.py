"""The command `lmprobe-tl`, one file a subcommand."""

from lmprobe_tl.cli.app import main

__all__ = ["main"]
