"""An evaluation as one HTML page that needs nothing else: no script, no other file, no network."""

from __future__ import annotations

from lmprobe_tl.report_page.page import save_report

__all__ = ["save_report"]
