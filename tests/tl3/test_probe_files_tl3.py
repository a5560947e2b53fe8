"""One probe file, fitted under TransformerLens 4 and used under 3.9: no warning, the same scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Tiny
from make_probe_files import FOLDER, NEGATIVE, POSITIVE, PROMPTS
from reference import assert_row, assert_same, make_probe

from lmprobe_tl import Probe, attach_probes, load_probe, monitored_generate, score_prompts
from lmprobe_tl.errors import IncompatibleProbeError
from lmprobe_tl.hook_points import model_record
from lmprobe_tl.probe_spec import ModelRecord

SCORES = json.loads((FOLDER / "scores.json").read_text())


def test_a_file_of_version_4_scores_prompts_the_same(tiny: Tiny) -> None:
    weights = load_probe(FOLDER / f"{tiny.name}.safetensors")
    assert weights.spec.versions["transformer-lens"].startswith("4.")
    found = score_prompts(tiny.model, PROMPTS, weights, strict=True)[tiny.name]
    assert_same(found.scores, SCORES[tiny.name]["scores"], "scores")
    for logits, expected in zip(found.token_logits, SCORES[tiny.name]["token_logits"], strict=True):
        assert_same(logits, expected, "logits")


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cache", "no cache"])
def test_a_file_of_version_4_scores_live_the_same(tiny: Tiny, use_past_kv_cache: bool) -> None:
    weights = load_probe(FOLDER / f"{tiny.name}.safetensors")
    options = {"max_new_tokens": 6, "do_sample": False, "strict": True, "use_past_kv_cache": use_past_kv_cache}
    results = monitored_generate(tiny.model, PROMPTS, weights, **options)
    for result, expected in zip(results, SCORES[tiny.name]["token_logits"], strict=True):
        assert_same(result.scores[tiny.name][: result.prompt_length], expected, "logits of the prompt")
        assert_row(tiny, result.tokens.tolist()[:-1], [weights], result.scores, result.running)


@pytest.mark.filterwarnings("ignore::lmprobe_tl.errors.PoolingMismatchWarning")  # as asked: trained on means, used on tokens
def test_a_probe_fitted_here_is_the_one_fitted_there(tiny: Tiny, tmp_path: Path) -> None:
    probe = Probe(
        tiny.model, hook_points=[1, 3], pooling="mean", inference_pooling="score:max", random_state=0, name=tiny.name
    )
    here = load_probe(probe.fit_contrast(POSITIVE, NEGATIVE).save(tmp_path / "here.safetensors"))
    there = load_probe(FOLDER / f"{tiny.name}.safetensors")
    torch.testing.assert_close(here.direction, there.direction, rtol=1e-3, atol=1e-4)
    assert here.spec.versions["transformer-lens"].startswith("3.9")
    same = ("hook_points", "model", "tokenizer", "residual_basis", "normalization", "pooling", "labels")
    assert [getattr(here.spec, field) for field in same] == [getattr(there.spec, field) for field in same]


def test_a_name_without_its_organisation_is_the_same_name(tiny: Tiny) -> None:
    here = model_record(tiny.model)

    def attach(name: str) -> None:
        record = ModelRecord(id=name, config_fingerprint=here.config_fingerprint)
        with attach_probes(tiny.model, make_probe(model=record), strict=True):
            tiny.model(torch.tensor([[0, 5]]))

    attach(f"tiny-{tiny.name}")
    attach(f"organisation/tiny-{tiny.name}")
    for other in (f"not-tiny-{tiny.name}", f"organisation/not-tiny-{tiny.name}", tiny.name, f"tiny-{tiny.name}/more"):
        with pytest.raises(IncompatibleProbeError, match="a model of the same shape"):
            attach(other)


def test_another_models_file_is_told_apart(all_tiny: dict[tuple[str, str], Tiny]) -> None:
    model = all_tiny["rmsnorm", "hooked"].model
    with (
        pytest.raises(
            IncompatibleProbeError, match=r"trained on 'tiny-layernorm' \(config [0-9a-f]{16}\), attached to 'tiny-rmsnorm'"
        ),
        attach_probes(model, FOLDER / "layernorm.safetensors", strict=True),
    ):
        pass
