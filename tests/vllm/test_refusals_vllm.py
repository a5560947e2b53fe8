"""What an engine with probes does not do, and says so: settings, probes and versions."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from conftest import SMALL, start
from reference import Reference, assert_outputs, make_probe

from lmprobe_tl.errors import EngineError, IncompatibleProbeError
from lmprobe_tl.weights import ProbeWeights

POINT = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def probe(llama: Reference) -> ProbeWeights:
    return make_probe(llama, "p", POINT, seed=1)


def narrow(hook_points: str = POINT, **fields: Any) -> ProbeWeights:
    return ProbeWeights.from_direction(torch.ones(64), name="narrow", hook_points=hook_points, **fields)


def test_another_worker_class(probe: ProbeWeights, llama: Reference) -> None:
    with pytest.raises(
        EngineError, match=r"worker_cls is 'my\.Worker'; probes need 'lmprobe_tl\.vllm\.worker\.ProbeWorker'"
    ):
        start(llama, [probe], worker_cls="my.Worker")


def test_additional_config_that_is_taken(probe: ProbeWeights) -> None:
    from lmprobe_tl.vllm import engine_kwargs

    with pytest.raises(EngineError, match="additional_config has 'lmprobe_tl' already"):
        engine_kwargs([probe], additional_config={"lmprobe_tl": {}})
    kept = engine_kwargs([probe], additional_config={"mine": 1}, model="m")
    assert kept["additional_config"]["mine"] == 1 and kept["model"] == "m"


def test_a_hook_point_that_compiled_blocks_do_not_show(llama: Reference) -> None:
    with pytest.raises(IncompatibleProbeError, match=r"'blocks\.2\.hook_mlp_out' cannot be read in vLLM"):
        start(llama, [narrow("blocks.2.hook_mlp_out")])


def test_a_capacity_that_is_too_small(probe: ProbeWeights, llama: Reference) -> None:
    with pytest.raises(EngineError, match="capacity is 1; expected at least 2"):
        start(llama, [probe, probe.renamed("q")], capacity=1)


@pytest.mark.parametrize(
    "version, is_supported", [("0.31.9", False), ("0.32.0", True), ("0.33.4rc1", True), ("0.34.0", False), ("1.32.0", False)]
)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str, is_supported: bool) -> None:
    import vllm

    from lmprobe_tl.vllm import _compat

    monkeypatch.setattr(vllm, "__version__", version)
    if is_supported:
        _compat.check_version()
        return
    with pytest.raises(EngineError, match=rf"vLLM is {version}; probes run inside vllm>=0\.32,<0\.34"):
        _compat.check_version()


@pytest.mark.parametrize(
    "options, named",
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative decoding",
        ),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "a KV connector"),
        ({"data_parallel_size": 2}, "data parallelism in one engine"),
        ({"kv_sharing_fast_prefill": True}, "a prefill that keeps tokens from late layers"),
        ({"enable_prompt_embeds": True}, "prompts as embeddings"),
        ({"runner": "pooling"}, "the runner 'pooling'"),
    ],
)
def test_settings_under_which_scores_would_be_wrong(llama: Reference, options: dict[str, Any], named: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from lmprobe_tl.vllm import _compat

    _compat.refuse_unsupported(EngineArgs(str(llama.folder), **SMALL).create_engine_config())
    with pytest.raises(EngineError, match=f"probes do not run in an engine with {named}"):
        _compat.refuse_unsupported(EngineArgs(str(llama.folder), **(SMALL | options)).create_engine_config())


@pytest.mark.parametrize(
    "module, name, leaves",
    [
        ("llama", "LlamaDecoderLayer", True),
        ("gemma2", "Gemma2DecoderLayer", True),
        ("gpt_oss", "TransformerBlock", True),
        ("gpt2", "GPT2Block", False),
        ("stablelm", "StablelmDecoderLayer", False),
        ("commandr", "CohereDecoderLayer", False),
        ("exaone4", "Exaone4DecoderLayer", False),
        ("phimoe", "PhiMoEDecoderLayer", False),
        ("granitemoehybrid", "GraniteMoeHybridAttentionDecoderLayer", False),
    ],
)
def test_blocks_that_leave_their_sum_to_the_next(module: str, name: str, leaves: bool) -> None:
    from lmprobe_tl.vllm._compat.blocks import leaves_its_sum_to_the_next

    block = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    assert leaves_its_sum_to_the_next(block) is leaves


def test_blocks_whose_stream_is_not_that_of_the_model() -> None:
    from lmprobe_tl.vllm._compat.blocks import decoder_blocks

    class Block(torch.nn.Module):
        routed_scaling_factor = 2.5

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Block(), Block()])

    assert list(decoder_blocks(Model(), 2, torch.bfloat16)) == [0, 1]
    with pytest.raises(EngineError, match="Model scales its residual stream in float16"):
        decoder_blocks(Model(), 2, torch.float16)
    with pytest.raises(EngineError, match="the 3 decoder blocks of Model cannot be told"):
        decoder_blocks(Model(), 3, torch.bfloat16)
    Model.__module__ = "vllm.model_executor.models.transformers.causal"
    with pytest.raises(EngineError, match="or are not vLLM's own"):
        decoder_blocks(Model(), 2, torch.bfloat16)


def test_an_engine_with_such_a_setting_does_not_start(
    probe: ProbeWeights, llama: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This one, since after an engine that guesses tokens vLLM starts no other in the same process.
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    with pytest.raises(EngineError, match="probes do not run in an engine with request ids that are not made unique"):
        start(llama, [probe], enforce_eager=True)


def test_an_engine_that_was_not_started_for_probes(llama: Reference) -> None:
    from vllm import LLM

    with pytest.raises(EngineError, match=r"additional_config has no 'lmprobe_tl', so no probe can be installed"):
        LLM(str(llama.folder), worker_cls="lmprobe_tl.vllm.worker.ProbeWorker", enforce_eager=True, **SMALL)


def test_probes_of_another_model(llama: Reference) -> None:
    with pytest.raises(IncompatibleProbeError, match=r"'narrow' is for a model with d_model 64 and any number of layers"):
        start(llama, [narrow()], enforce_eager=True)
    with pytest.raises(IncompatibleProbeError, match=r"hook point 'blocks\.7\.hook_resid_post' is beyond the 4 layers"):
        start(llama, [narrow("blocks.7.hook_resid_post")], enforce_eager=True)


def test_a_refused_replacement_changes_nothing(probe: ProbeWeights, llama: Reference) -> None:
    from vllm import SamplingParams

    rows = [{"prompt_token_ids": llama.encode("def f(a):", bos=True)}]
    too_many = [probe.renamed(name) for name in "abc"]
    with start(llama, [probe], enforce_eager=True, capacity=2) as engine:
        for refused, text in (
            (too_many, "compiled for 2"),
            ([make_probe(llama, "elsewhere", "blocks.1.hook_resid_post", seed=2)], r"engine was compiled for 'blocks\.2"),
            ([narrow()], "d_model 64"),
        ):
            with pytest.raises(IncompatibleProbeError, match=text):
                engine.replace_probes(refused)
            outputs = engine.generate(rows, SamplingParams(max_tokens=3), use_tqdm=False)
            assert_outputs(llama, outputs, [probe])
