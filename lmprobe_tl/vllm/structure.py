"""What of the probes is compiled into an engine: which hook points are read, and how many columns each has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lmprobe_tl.errors import EngineError, IncompatibleProbeError
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.weights import ProbeWeights

CONFIG_KEY = "lmprobe_tl"
WORKER_CLASS = "lmprobe_tl.vllm.worker.ProbeWorker"
PROBES_VARIABLE = "LMPROBE_TL_PROBES"  # of the server's environment: a JSON list of paths
FORMAT = 1
Mode: TypeAlias = Literal["scores", "activations"]
_HOOK_NAME = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


@dataclass(frozen=True)
class ResidualPoint:
    """A place in the residual stream: the output of block `layer`, or the input of block 0 as layer -1."""

    layer: int

    @classmethod
    def of(cls, hook_name: str, n_layers: int | None = None) -> ResidualPoint:
        """IncompatibleProbeError for a hook point that an engine does not have."""
        found = _HOOK_NAME.fullmatch(hook_name)
        if found is None:
            raise IncompatibleProbeError(
                f"hook point {hook_name!r} cannot be read in vLLM, whose compiled blocks show the residual stream between "
                "them alone: blocks.{i}.hook_resid_pre and blocks.{i}.hook_resid_post. Train the probe on one of these."
            )
        block = int(found[1])
        if n_layers is not None and block >= n_layers:
            raise IncompatibleProbeError(f"hook point {hook_name!r} is beyond the {n_layers} layers of the served model.")
        return cls(block if found[2] == "post" else block - 1)


@dataclass(frozen=True)
class Structure:
    """columns: by hook name, how many columns are reserved; with mode 'activations' the vectors themselves are kept.

    A compiled graph depends on nothing else of the probes, so this is what the engine's configuration, and with it the key
    of its compile cache, holds. The numbers come later, and may change while the engine runs.
    """

    columns: Mapping[str, int]
    mode: Mode = "scores"

    @classmethod
    def of(cls, plan: ScoringPlan, capacity: int | None = None) -> Structure:
        """The structure of a plan's probes. capacity: columns to reserve at each hook point, for later probes."""
        needed = {name: len(hook.bias) for name, hook in plan.hooks.items()}
        most = max(needed.values())
        if capacity is not None and capacity < most:
            raise EngineError(f"capacity is {capacity!r}; expected at least {most}, the columns that these probes need.")
        return cls({name: capacity or count for name, count in needed.items()})

    def to_config(self) -> dict[str, Any]:
        """For `additional_config` of vLLM."""
        return {CONFIG_KEY: {"format": FORMAT, "mode": self.mode, "columns": dict(sorted(self.columns.items()))}}

    @classmethod
    def from_config(cls, additional_config: Any) -> Structure:
        """EngineError where the engine was not started for probes, or by another version of this package."""
        entry = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        hint = "start the engine with lmprobe_tl.vllm.engine_kwargs(probes), or by lmprobe-tl serve"
        if not isinstance(entry, Mapping):
            raise EngineError(f"additional_config has no {CONFIG_KEY!r}, so no probe can be installed; {hint}.")
        if entry.get("format") != FORMAT:
            found = entry.get("format")
            raise EngineError(f"additional_config[{CONFIG_KEY!r}] has format {found!r}; expected {FORMAT}; {hint}.")
        columns, mode = entry.get("columns"), entry.get("mode")
        good = isinstance(columns, Mapping) and columns and all(type(n) is int and n > 0 for n in columns.values())
        if not good or columns is None or mode not in ("scores", "activations"):
            raise EngineError(f"additional_config[{CONFIG_KEY!r}] is {entry!r}, with no usable columns or mode; {hint}.")
        return cls(dict(columns), mode)

    def check_fits(self, plan: ScoringPlan) -> None:
        """IncompatibleProbeError where the probes need a hook point or columns that were not compiled in."""
        for name, hook in plan.hooks.items():
            if name not in self.columns:
                raise IncompatibleProbeError(
                    f"the probes read {name!r}, but this engine was compiled for {', '.join(map(repr, self.columns))}. "
                    "Start it with these probes."
                )
            if len(hook.bias) > self.columns[name]:
                raise IncompatibleProbeError(
                    f"the probes have {len(hook.bias)} columns at {name!r}, but this engine was compiled for "
                    f"{self.columns[name]}. Start it with these probes, or with capacity={len(hook.bias)}."
                )


def check_shape(weights: ProbeWeights, d_model: int, n_layers: int) -> None:
    """IncompatibleProbeError where a probe cannot score a model of this width and depth in an engine."""
    spec = weights.spec
    for name in spec.hook_points:
        ResidualPoint.of(name, n_layers)
    if spec.d_model != d_model or spec.n_layers not in (None, n_layers):
        raise IncompatibleProbeError(
            f"probe {spec.name!r} is for a model with d_model {spec.d_model} and {spec.n_layers or 'any number of'} "
            f"layers, but the served model has {d_model} and {n_layers}. It was trained on "
            f"{spec.model.id or 'an unnamed model'!r}; serve that."
        )
