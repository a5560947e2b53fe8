"""lmprobe, installed in a folder of its own and asked through a pipe, so that its runs take turns with ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERSION = "0.10.3"
FOLDER = Path("build") / f"bench-lmprobe-{VERSION}"


def install(folder: Path = FOLDER) -> Path:
    """Install lmprobe alone; what it needs (torch, transformers, accelerate, scikit-learn) is this environment's, the same
    for both."""
    if not (folder / "lmprobe").is_dir():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(folder),
            f"lmprobe=={VERSION}",
        ]
        subprocess.run(command, check=True)
    return folder


def probe_scores(cache: Path, **request: Any) -> dict[str, Any]:
    """What `lmprobe_scores` answers to a request; `cache`: a folder for lmprobe's cache."""
    environment = os.environ | {"PYTHONPATH": str(install().resolve()), "LMPROBE_CACHE_DIR": str(cache)}
    worker = Path(__file__).with_name("lmprobe_scores.py")
    done = subprocess.run(
        [sys.executable, str(worker)], input=json.dumps(request), capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"lmprobe stopped with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


class LmprobeProcess:
    """lmprobe on one model and layer; `cache`: a folder for its cache."""

    def __init__(self, model_folder: Path, layer: int, pooling: str, texts: Sequence[str], cache: Path) -> None:
        worker = Path(__file__).with_name("lmprobe_worker.py")
        environment = os.environ | {"PYTHONPATH": str(install().resolve()), "LMPROBE_CACHE_DIR": str(cache)}
        self._process = subprocess.Popen(
            [sys.executable, str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.facts = self._ask(folder=str(model_folder), layer=layer, pooling=pooling, texts=list(texts))

    def run(self, how: str, texts: Sequence[str]) -> tuple[float, list[float]]:
        """Seconds, measured there, and the first text's activations. how: a key of `WAYS` in `lmprobe_worker`."""
        answer = self._ask(how=how, texts=list(texts))
        return answer["seconds"], answer["first_row"]

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"lmprobe stopped with exit code {self._process.wait()}; run benchmarks/lmprobe_worker.py by hand."
            )
        return json.loads(line)
