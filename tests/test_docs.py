"""README's code and commands, and the examples, run as they stand."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def readme_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which README's Python blocks have run, one after another."""
    folder = tmp_path_factory.mktemp("readme")
    assert len(blocks("python")) >= 3
    script = "\n".join(blocks("python"))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:lmprobe_tl", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder / "output.txt").write_text(done.stdout)
    return folder


def test_readme_code_runs(readme_folder: Path) -> None:
    output = (readme_folder / "output.txt").read_text()
    assert "torch.Size([4, 192])" in output
    assert (readme_folder / "prose.safetensors").stat().st_size < 10_000


def test_readme_commands_run(
    readme_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmprobe_tl.cli.app import main

    monkeypatch.chdir(readme_folder)
    Path("prompts.txt").write_text("# a comment\nx = 1\n")
    Path("harmless.txt").write_text("".join(f"{name} = {name}(value)\n" for name in dir(str)))
    records = [{"text": f"# note {i}\n" if i % 2 else f"x = {i}\n", "label": i % 2} for i in range(20)]
    Path("labelled.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    commands = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(commands) == 9
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert "blocks.3.hook_resid_post" in output
    assert Path("mine.safetensors").is_file()


def test_readme_opens_with_the_two_commands_and_make_has_them() -> None:
    first = blocks("console")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", makefile, re.MULTILINE)
    assert re.search(r"^test:", makefile, re.MULTILINE)


EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if not path.stem.startswith("vllm_")]  # of tests/vllm


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:lmprobe_tl", str(example)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
