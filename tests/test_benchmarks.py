"""The benchmark commands run, see every case, and keep what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_live


def test_the_live_benchmark_measures_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "live.json"
    small = ["--models", "demo", "--batches", "2", "--rounds", "1", "--steps", "2", "--new-tokens", "2", "--long", "1000"]
    bench_live.main([*small, "--out", str(out)])
    result = json.loads(out.read_text())
    found = {(row["what"], row["case"]): row for row in result["rows"]}
    assert {case for what, case in found if what == "step"} == {case.name for case in bench_live.CASES}
    assert sum(what == "generate" for what, _ in found) == 3
    assert all(row["ratio"] > 0 and row["low"] <= row["ratio"] <= row["high"] for row in found.values())
    assert "1,000 probes on one hook point" in capsys.readouterr().out
    kept, dropped = result["memory"]
    assert kept["bytes_per_token"] > dropped["bytes_per_token"] > 0
    assert set(result["state_bytes_a_row_and_probe"]) >= {"max", "ema_max(0.5)", "rolling_max(10)"}
