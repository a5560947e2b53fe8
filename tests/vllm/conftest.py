"""Engines of vLLM on the CPU, one after another in this process, and the same models under Hugging Face.

A lane of its own (`make test-vllm`), since vLLM needs versions and gigabytes that the rest of the tests do not.
"""

from __future__ import annotations

import gc
import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_CPU_CI_ENV="1",  # compiled graphs are traced, and then run without Inductor: three seconds, not thirty
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tensors as small as here threads only wait for each other

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from reference import Reference

# 8,192 tokens of cache, since of the gigabyte that is the least otherwise every page is written at each start.
SMALL = {
    "max_model_len": 192,
    "block_size": 32,
    "num_gpu_blocks_override": 256,
    "max_num_seqs": 8,
    "dtype": "float32",
    "seed": 0,
}


def _freeze_for_good(freeze: Callable[[], None] = gc.freeze) -> None:
    """Takes what is there out of garbage collection, once: all that the first engine imported.

    vLLM freezes at the start of each engine and thaws at its end, and between that collects garbage eight times, each time
    half a second long; of what later engines leave, it is a few milliseconds.
    """
    gc.freeze = gc.unfreeze = lambda: None
    freeze()


_thaw, gc.freeze = gc.unfreeze, _freeze_for_good


def pytest_unconfigure() -> None:
    _thaw()  # or libraries report at exit that objects of theirs were never freed


@pytest.fixture(scope="session", autouse=True)
def _look_at_architectures_here() -> None:
    """vLLM starts a process for each one that a machine has not seen, lest CUDA be initialised, which is not here."""
    from vllm.model_executor.models import registry

    assert callable(registry._run_in_subprocess)
    registry._run_in_subprocess = lambda look: look()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In each module the tests that start an engine of their own come last: the one that the others share stays."""
    order = {module: at for at, module in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: (order[item.path], "alone" in getattr(item, "fixturenames", ())))


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    folders = tiny_models.save_models(tmp_path_factory.mktemp("models"))
    return {name: Reference(name, folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def demo(references: dict[str, Reference]) -> Reference:
    return references["demo"]


@pytest.fixture(scope="session")
def llama(references: dict[str, Reference]) -> Reference:
    return references["llama"]


def start(reference: Reference, probes: Any, **options: Any) -> Any:
    """A `ProbedLLM` of the model, small."""
    from lmprobe_tl.vllm import ProbedLLM

    return ProbedLLM(Path(reference.folder), probes=probes, **(SMALL | options))


class SharedEngine:
    """One engine for most of a module's tests: in one process, vLLM has room for one at a time."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start, self._running = start, None

    def get(self) -> Any:
        if self._running is None:
            self._running = self._start()
        return self._running

    def stop(self) -> None:
        if self._running is not None:
            self._running.close()
        self._running = None


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest) -> Iterator[SharedEngine]:
    """Of the module's own `start_shared`."""
    one = SharedEngine(request.module.start_shared)
    yield one
    one.stop()


@pytest.fixture
def engine(shared: SharedEngine) -> Any:
    return shared.get()


@pytest.fixture
def alone(shared: SharedEngine) -> None:
    """For a test that starts an engine of its own."""
    shared.stop()
