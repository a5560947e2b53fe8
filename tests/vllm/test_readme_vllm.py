"""README's code for vLLM runs as it stands, and its commands are ones that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from reference import Reference

from lmprobe_tl import ProbeWeights
from lmprobe_tl.cli.serve import additional_config

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language} vllm\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_code_runs(demo: Reference, tmp_path: Path) -> None:
    direction = torch.randn(192, generator=torch.Generator().manual_seed(0))
    ProbeWeights.from_direction(direction, name="prose", hook_points="blocks.3.hook_resid_post").save(
        tmp_path / "prose.safetensors"
    )
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("torch.Size([") == 2, done.stdout


def test_commands_have_options_of_ours_and_of_vllm() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    commands = [line[2:] for line in blocks("console")[0].splitlines() if line.startswith("$ lmprobe-tl serve")]
    assert len(commands) == 3
    for command in commands:
        _, others = additional_config(shlex.split(command, comments=True)[2:])
        names = {word[2:].replace("-", "_") for word in others if word.startswith("--")}
        assert names - {"model", "probe"} <= set(AsyncEngineArgs.__dataclass_fields__), command
