"""README's code for vLLM runs as it stands, and its commands are ones that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from lmprobe_tl import ProbeWeights
from lmprobe_tl.cli.serve import additional_config

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language} vllm\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    direction = torch.randn(192, generator=torch.Generator().manual_seed(0))
    ProbeWeights.from_direction(direction, name="prose", hook_points="blocks.3.hook_resid_post").save(
        tmp_path / "prose.safetensors"
    )
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.count("torch.Size([") == 2


def test_commands_have_options_of_ours_and_of_vllm() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    commands = [line[2:] for line in blocks("console")[0].splitlines() if line.startswith("$ lmprobe-tl serve")]
    assert len(commands) == 3
    for command in commands:
        _, others = additional_config(shlex.split(command, comments=True)[2:])
        names = {word[2:].replace("-", "_") for word in others if word.startswith("--")}
        assert names - {"model", "probe"} <= set(AsyncEngineArgs.__dataclass_fields__), command
