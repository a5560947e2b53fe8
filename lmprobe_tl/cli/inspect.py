"""`lmprobe-tl inspect`: print what is in a probe file."""

from __future__ import annotations

from lmprobe_tl.cli.options import ProbeArgument


def inspect(probe: ProbeArgument) -> None:
    """Print what is in a probe file."""
    from lmprobe_tl.probe_file import load_probe
    from lmprobe_tl.probe_summary import probe_summary

    rows = probe_summary(load_probe(probe))
    widest = max(len(key) for key in rows)
    for key, value in rows.items():
        print(f"{key:<{widest}}  {value}")
