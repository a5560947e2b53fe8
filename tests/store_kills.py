"""Extractions to a store that are killed with SIGKILL: children forked from one warm process, since a start takes seconds.

Run as a script with the folder of a model and a folder to work in; prints one JSON report, which test_store_resume.py
judges. A process of its own, so that no thread or lock of a test run is copied into the children.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lmprobe_tl import ActivationStore, extract_activations, extract_to_store, files
from lmprobe_tl.errors import StoreError
from lmprobe_tl.hook_points import load_model

ASYNCHRONOUS_KILLS = 12
SETTINGS: dict[str, Any] = {
    "hook_points": [0, 1],  # low: a pass ends after the last of them
    "pooling": ["mean", "all"],
    "keep_tokens": True,
    "prompts_per_shard": 5,
    "max_tokens_per_batch": 40,
    "progress": False,
}


def prompts_of(n_prompts: int, seed: int = 0) -> list[torch.Tensor]:
    """Rows of 1 to 12 tokens, some of them equal."""
    drawn = random.Random(seed)
    rows = [[drawn.randrange(3, 300) for _ in range(drawn.randint(1, 12))] for _ in range(n_prompts)]
    return [torch.tensor(rows[drawn.randrange(n_prompts)] if index % 4 == 3 else rows[index]) for index in range(n_prompts)]


PROMPTS = prompts_of(13)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def start(action: Callable[[], object]) -> int:
    """Do it in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        action()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def end_of(child: int) -> str:
    """'finished', 'killed', or 'failed' for a child that raised."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else f"signal {os.WTERMSIG(status)}"
    return "failed" if os.WEXITSTATUS(status) else "finished"


def watch_steps(model: Any, on_step: Callable[[str], None]) -> None:
    """From now on call `on_step` before, amid and after everything that the writer does to files, and at forward passes."""
    of = "folder"  # what the latest temporary file is to become

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            on_step(f"before {name} of {of}")
            result = function(*arguments, **named)
            on_step(f"after {name} of {of}")
            return result

        return call

    class Halves:
        """A file whose payload arrives in two parts."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Halves:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, payload: bytes) -> None:
            nonlocal of
            of = {b'{"format': "manifest", b'{"index"': "index"}.get(payload[:8], "shard")
            on_step(f"before write of {of}")
            self.file.write(payload[: len(payload) // 2])
            self.file.flush()
            on_step(f"amid write of {of}")
            self.file.write(payload[len(payload) // 2 :])

    for name in ("mkdir", "fsync", "replace", "link", "unlink"):
        setattr(os, name, watched(name, getattr(os, name)))
    files.open = lambda *arguments: Halves(open(*arguments))  # type: ignore[attr-defined]  # noqa: SIM115
    model.original_model.register_forward_pre_hook(lambda *_: on_step("at forward pass"))


class Experiment:
    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder, self._made = model, folder, 0
        reference = self.new_folder()
        begun = time.perf_counter()
        assert end_of(start(lambda: self.extract(reference))) == "finished"
        self.duration = time.perf_counter() - begun
        self.expected = contents(reference)
        self.tensors = ActivationStore(reference).values(pooling="all")

    def new_folder(self) -> Path:
        self._made += 1
        return self.folder / f"store-{self._made}"

    def extract(self, path: Path, **settings: Any) -> None:
        extract_to_store(self.model, PROMPTS, path, **{**SETTINGS, **settings})

    def state_of(self, path: Path) -> str:
        """What a reader finds in a store that was killed; whatever it can read must be right."""
        try:
            store = ActivationStore(path)
            assert torch.equal(store.values(pooling="all"), self.tensors)
        except StoreError as error:
            if "it has no manifest.json" in str(error):
                return "no manifest"
            if "is not complete" not in str(error):
                raise
            missing = len(store.missing_shards)
            return "no index" if not missing else "all shards missing" if missing == 3 else "some shards missing"
        return "complete"

    def resumed(self, path: Path) -> bool:
        """Whether the store is what an uninterrupted run writes, byte for byte and file for file, once it is run again."""
        assert end_of(start(lambda: self.extract(path))) == "finished"
        return contents(path) == self.expected

    def steps(self) -> list[str]:
        """The steps of one uninterrupted run."""
        path, noted = self.new_folder(), self.folder / "steps.json"

        def run() -> None:
            steps: list[str] = []
            watch_steps(self.model, steps.append)
            self.extract(path)
            noted.write_text(json.dumps(steps))

        assert end_of(start(run)) == "finished"
        assert contents(path) == self.expected
        return json.loads(noted.read_text())

    def kill_at(self, path: Path, step: int) -> str:
        def run() -> None:
            left = step

            def count(_: str) -> None:
                nonlocal left
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

            watch_steps(self.model, count)
            self.extract(path)

        return end_of(start(run))

    def killed_at_every_step(self) -> dict[str, Any]:
        """Each step once: killed there, looked at, run again."""
        steps, states, ends, differing, leftovers = self.steps(), Counter[str](), Counter[str](), [], 0
        for number, step in enumerate(steps):
            path = self.new_folder()
            ends[self.kill_at(path, number)] += 1
            states[self.state_of(path)] += 1
            leftovers += path.exists() and any(".tmp" in name for name in contents(path))
            if not self.resumed(path):
                differing.append(step)
        return {
            "steps": Counter(steps),
            "ends": ends,
            "states": states,
            "with leftovers": leftovers,
            "differing": differing,
        }

    def killed_again_and_again(self, seed: int) -> dict[str, Any]:
        """One folder, each run killed a few steps after where it went on, until a run arrives at the end."""
        drawn, path, kills = random.Random(seed), self.new_folder(), 0
        while self.kill_at(path, drawn.randrange(4, 22)) == "killed":
            kills += 1
        return {"kills": kills, "same": contents(path) == self.expected}

    def killed_at_any_moment(self, seed: int) -> dict[str, Any]:
        """By another process, after a random time."""
        drawn, states, same, kills = random.Random(seed), Counter[str](), True, 0
        path = self.new_folder()
        while kills < ASYNCHRONOUS_KILLS:
            child = start(lambda path=path: self.extract(path))
            time.sleep(drawn.uniform(0, 0.6 * self.duration))
            os.kill(child, signal.SIGKILL)
            if end_of(child) == "killed":
                kills += 1
                states[self.state_of(path)] += 1
            if states["complete"] or drawn.random() < 0.3:
                same &= self.resumed(path)
                path = self.new_folder()
        return {"kills": kills, "states": states, "same": same and self.resumed(path)}

    def at_once(self, *settings: dict[str, Any], kill: bool = False) -> dict[str, Any]:
        """Several processes on one folder."""
        path = self.new_folder()
        children = [start(lambda one=one: self.extract(path, **one)) for one in settings]
        if kill:
            time.sleep(0.3 * self.duration)
            os.kill(children[0], signal.SIGKILL)
        ends = [end_of(child) for child in children]
        return {"ends": ends, "same": contents(path) == self.expected}


class Lazy(Sequence[Any]):
    """Prompts of 24 tokens that are made when they are asked for."""

    def __init__(self, n_prompts: int) -> None:
        self.n_prompts = n_prompts

    def __len__(self) -> int:
        return self.n_prompts

    def __getitem__(self, index: Any) -> Any:
        if index >= self.n_prompts:
            raise IndexError(index)
        return torch.arange(24) + index % 250 + 3


def memory_of(folder: Path, action: Callable[[], object]) -> float:
    """MiB that the action takes at its peak, on top of what was there."""

    def measured() -> None:
        def status(key: str) -> int:
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line.split()[1] for line in lines if line.startswith(key)))

        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = status("VmRSS:")
        action()
        (folder / "memory.json").write_text(json.dumps((status("VmHWM:") - before) / 1024))

    assert end_of(start(measured)) == "finished"
    return json.loads((folder / "memory.json").read_text())


def memory(model: Any, folder: Path) -> dict[str, float]:
    def store(n_prompts: int) -> None:
        extract_to_store(model, Lazy(n_prompts), folder / f"of-{n_prompts}", 0, "all", prompts_per_shard=250, progress=False)

    return {
        "store of 2,000": memory_of(folder, lambda: store(2000)),
        "store of 8,000": memory_of(folder, lambda: store(8000)),
        "in memory, of 2,000": memory_of(folder, lambda: extract_activations(model, Lazy(2000), 0, "all", progress=False)),
        "in memory, of 8,000": memory_of(folder, lambda: extract_activations(model, Lazy(8000), 0, "all", progress=False)),
    }


def main(model_folder: str, work: str) -> None:
    torch.set_num_threads(1)
    # tqdm's own lock is shared with forked processes: a child that is killed while it holds it would stop all others.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0  # nor may a thread hold it while a child is forked
    model = load_model(Path(model_folder))
    extract_activations(model, PROMPTS[:2], progress=False)  # warm
    run = Experiment(model, Path(work))
    report = {
        "every step": run.killed_at_every_step(),
        "again and again": [run.killed_again_and_again(seed) for seed in range(2)],
        "any moment": run.killed_at_any_moment(seed=0),
        "two writers": [run.at_once({}, {}) for _ in range(2)],
        "two writers, one killed": [run.at_once({}, {}, kill=True) for _ in range(2)],
        "three workers": [run.at_once(*({"shard": (i, 3)} for i in (2, 0, 1)))],
        "memory": memory(model, Path(work)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
