"""Beside SAELens: an SAE takes the place of a hook point, and a probe there must say so instead of scoring nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, load_hooked
from reference import assert_monitor, assert_row, make_probe
from sae_lens import SAE, HookedSAETransformer, StandardSAE, StandardSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from tiny_models import D_MODEL

from lmprobe_tl import attach_probes, extract_activations, monitored_generate, score_prompts
from lmprobe_tl.errors import IncompatibleProbeError, ProbeNeverFiredError, UnknownHookPointError

HERE, BELOW, ABOVE = "blocks.2.hook_resid_post", "blocks.1.hook_resid_post", "blocks.3.hook_resid_post"
TOKENS = torch.tensor([[0, 5, 6, 7, 8]])


def make_sae(hook_name: str) -> SAE[Any]:
    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=64, device="cpu", metadata=SAEMetadata(hook_name=hook_name)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.fixture(scope="module")
def module_model(folders: dict[str, Path]) -> Any:
    return load_hooked(folders["layernorm"], processed=True, kind=HookedSAETransformer)


@pytest.fixture
def model(module_model: Any) -> Iterator[Any]:
    yield module_model
    module_model.reset_saes()
    assert not [name for name, point in module_model.hook_dict.items() if point.fwd_hooks]


@pytest.fixture
def tiny(model: Any, folders: dict[str, Path], all_tiny: dict[tuple[str, str], Tiny]) -> Tiny:
    return Tiny("layernorm", "hooked", folders["layernorm"], model, all_tiny["layernorm", "hooked"].reference)


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cache", "no cache"])
def test_without_an_sae_it_is_a_hooked_transformer_like_any_other(tiny: Tiny, use_past_kv_cache: bool) -> None:
    probe = make_probe(hook_points=HERE)
    options = {"max_new_tokens": 5, "do_sample": False, "use_past_kv_cache": use_past_kv_cache}
    for result in monitored_generate(tiny.model, ["cats", "the model reads"], probe, **options):
        assert_row(tiny, result.tokens.tolist()[:-1], [probe], result.scores, result.running)


def test_a_probe_where_an_sae_was_put_is_refused_with_the_reason(model: Any) -> None:
    model.add_sae(make_sae(HERE))
    message = rf"another module in the place of hook point '{HERE}'.*'{HERE}\.hook_sae_.*Take it off first"
    with pytest.raises(IncompatibleProbeError, match=message), attach_probes(model, make_probe(hook_points=HERE)):
        pass
    with pytest.raises(IncompatibleProbeError, match=message):
        monitored_generate(model, ["cats"], make_probe(hook_points=HERE), max_new_tokens=2)
    with pytest.raises(IncompatibleProbeError, match=message):
        score_prompts(model, ["cats"], make_probe(hook_points=HERE))
    for wanted in (2, HERE):
        with pytest.raises(UnknownHookPointError, match=message):
            extract_activations(model, ["cats"], hook_points=wanted)
    model.reset_saes()
    assert len(extract_activations(model, ["cats"], hook_points=HERE).values[HERE]) == 1


def test_an_sae_put_in_place_while_a_probe_is_attached_is_an_error(model: Any) -> None:
    sae, probes = make_sae(HERE), [make_probe(hook_points=HERE), make_probe("other", ABOVE)]

    def for_one_pass() -> None:
        model.run_with_saes(TOKENS, saes=[sae])

    def for_a_later_pass() -> None:
        model(TOKENS)
        model.run_with_saes(TOKENS + 1, saes=[sae])

    def for_good() -> None:
        model.add_sae(sae)
        model.generate(TOKENS, max_new_tokens=3, verbose=False)

    message = rf"hook points \['{HERE}'\] did not fire in a forward pass, so probes \['p'\] saw no activation of it.*an SAE"
    for run in (for_one_pass, for_a_later_pass, for_good):
        with pytest.raises(ProbeNeverFiredError, match=message), attach_probes(model, probes):
            run()
        model.reset_saes()


def test_a_probe_below_an_sae_is_not_touched_and_one_above_reads_what_comes_out_of_it(tiny: Tiny) -> None:
    below, above = make_probe("below", BELOW), make_probe("above", ABOVE)
    with attach_probes(tiny.model, [below, above]) as plain:
        tiny.model(TOKENS)
    tiny.model.add_sae(make_sae(HERE))
    with attach_probes(tiny.model, [below, above]) as spliced:
        _, cache = tiny.model.run_with_cache(TOKENS)
    with attach_probes(tiny.model, below) as alone:
        tiny.model(TOKENS)
    assert_monitor(tiny, alone, TOKENS.tolist(), [below])
    torch.testing.assert_close(spliced.token_scores("below")[0], plain.token_scores("below")[0])
    torch.testing.assert_close(spliced.token_scores("above")[0], above.logits(cache[ABOVE][0]).detach())
    assert (spliced.token_scores("above")[0] - plain.token_scores("above")[0]).abs().max() > 0.1


def test_the_bridge_of_saelens_has_canonical_names_alone(
    folders: dict[str, Path], all_tiny: dict[tuple[str, str], Tiny]
) -> None:
    """SAETransformerBridge (beta) drops the aliases from hook_dict: 'hook_out' is there, 'hook_resid_post' is not."""
    model = SAETransformerBridge.boot_transformers(str(folders["layernorm"]), device="cpu")
    with attach_probes(model, make_probe(hook_points="blocks.2.hook_out")) as monitor:
        model(TOKENS)
    expected = make_probe().logits(all_tiny["layernorm", "bridge"].hidden(TOKENS[0].tolist(), 2))
    torch.testing.assert_close(monitor.token_scores("p")[0], expected, rtol=1e-4, atol=1e-4)
    with (
        pytest.raises(
            IncompatibleProbeError, match=r"no hook point 'blocks\.2\.hook_resid_post'\. Closest: 'blocks\.2\.hook_out'"
        ),
        attach_probes(model, make_probe(hook_points="blocks.2.hook_resid_post")),
    ):
        pass
    model.add_sae(make_sae("blocks.2.hook_out"))
    with (
        pytest.raises(IncompatibleProbeError, match=r"another module in the place of hook point 'blocks\.2\.hook_out'"),
        attach_probes(model, make_probe(hook_points="blocks.2.hook_out")),
    ):
        pass
