"""The benchmark commands run, see every case, and keep what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from embedded import embedded_model, embedded_tokenizer
from transformers import AutoModelForCausalLM

from benchmarks import bench_extract, bench_fitting, bench_live
from benchmarks.forwards import Workload
from benchmarks.texts import NumberedTexts, ragged_texts
from lmprobe_tl import extract_activations
from lmprobe_tl.demo import MODEL_FOLDER
from lmprobe_tl.estimators import CLASSIFIERS
from lmprobe_tl.tokens import batches_by_length


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


def test_the_extraction_benchmark_measures_every_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "extract.json"
    small = ["--models", "demo", "--rounds", "1", "--prompts", "3", "--skip-lmprobe", "--skip-memory"]
    bench_extract.main([*small, "--out", str(out)])
    result = json.loads(out.read_text())
    found = {(row["what"], row["against"]): row for row in result["rows"]}
    against_bare = {what for what, against in found if against == "bare forward"}
    assert against_bare == {
        "middle layer, mean",
        "middle layer, last_token",
        "all layers, mean",
        "all layers, last_token",
        "middle layer, mean, of token ids",
        "middle layer, mean, texts of at most 32 tokens",
    }
    by_hand = {"Hugging Face, output_hidden_states", "run_with_cache", "run_with_cache, names_filter"}
    assert {against for what, against in found if what == "all layers, mean"} == {
        *by_hand,
        "bare forward",
        "last layer, mean",
    }
    assert found["middle layer, mean", "bare forward"]["target"] == 1.05
    assert all(row["ratio"] > 0 and row["low"] <= row["ratio"] <= row["high"] for row in found.values())
    assert result["workload"]["demo"]["prompts"] == 3 and result["workload"]["demo"]["padding"] >= 1
    (store,) = result["store"]
    assert store["megabytes"] > 0 and store["first_read_mb_s"] > 0 and store["next_read_mb_s"] > 0
    assert result["lmprobe"] == {"demo": None} and result["memory"] == []
    assert "run_with_cache" in capsys.readouterr().out


def test_what_extraction_is_compared_with_computes_the_same() -> None:
    model, plain = embedded_model(), AutoModelForCausalLM.from_pretrained(MODEL_FOLDER).eval()
    work = Workload(model, plain, ragged_texts(embedded_tokenizer(), 6))
    found = extract_activations(model, work.texts, [1, 4], "mean", include_bos=True, progress=False)
    groups = batches_by_length([len(row) for row in work.rows])
    order = [index for group in groups for index in group]
    for pooled in (
        work.hidden_states([1, 4]),
        work.run_with_cache([1, 4], filtered=True),
        work.run_with_cache([1, 4], filtered=False),
    ):
        for layer in (1, 4):
            together = torch.cat([batch[layer] for batch in pooled])
            torch.testing.assert_close(together, found.values[f"blocks.{layer}.hook_resid_post"][order])


def test_bare_passes_stop_at_their_layer() -> None:
    model, plain = embedded_model(), AutoModelForCausalLM.from_pretrained(MODEL_FOLDER).eval()
    work = Workload(model, plain, ["x = 1\n", "import os\n"])
    for blocks, bare in ((model.blocks, work.bare), (plain.model.layers, work.plain_bare)):
        seen: list[int] = []
        handles = [
            block.register_forward_pre_hook(lambda *_, seen=seen, layer=layer: seen.append(layer))
            for layer, block in enumerate(blocks)
        ]
        bare(2)
        for handle in handles:
            handle.remove()
        assert seen == [0, 1, 2]
        assert not blocks[2]._forward_hooks


def test_the_texts_are_ragged_and_differ() -> None:
    texts = ragged_texts(embedded_tokenizer(), 400)
    lengths = [len(ids) for ids in embedded_tokenizer()(texts, add_special_tokens=False)["input_ids"]]
    assert len(set(texts)) == 400 and min(lengths) >= 5 and max(lengths) <= 401  # cut text may tokenise a little otherwise
    assert max(lengths) > 10 * sorted(lengths)[40]
    assert texts != ragged_texts(embedded_tokenizer(), 400, seed=1)
    numbered = list(NumberedTexts(texts[:2], 5))
    assert len(set(numbered)) == 5 and numbered[3].endswith(texts[1])


def test_the_fitting_benchmark_measures_both_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fitting.json"
    small = ["--sequences", "40", "--tokens", "12", "--d", "4", "--examples", "60", "--features", "8", "--rounds", "2"]
    arguments = [*small, "--logistic-features", "5", "--threads", "1", "--out", str(out)]
    sizes = bench_fitting.Sizes(40, 12, 4, 60, 8, 5, 2)
    for name in set(CLASSIFIERS) - {"ccs"}:
        row = bench_fitting.measure(name, torch.get_num_threads(), sizes)
        assert row["auroc"] > 0.7, name
        assert row["epochs"] is None or row["epochs"] >= row["best_epoch"]
    bench_fitting.main([*arguments, "--classifiers", bench_fitting.LOGISTIC])
    first = json.loads(out.read_text())["rows"]
    logistic = first[bench_fitting.LOGISTIC]["1"]
    assert logistic["threads"] == 1
    assert 0 < logistic["low"] <= logistic["ratio"] <= logistic["high"]
    assert "ours" in capsys.readouterr().out
    bench_fitting.main([*arguments, "--classifiers", bench_fitting.LOGISTIC])  # measures nothing again
    assert json.loads(out.read_text())["rows"] == first
