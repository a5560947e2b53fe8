"""`lmprobe-tl serve`: vLLM's OpenAI server, with probes."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from lmprobe_tl.cli.options import local_shape
from lmprobe_tl.errors import EngineError, InputError

MIDDLEWARE = "lmprobe_tl.vllm.server.ProbeMiddleware"
_OURS = {"--worker-cls": "worker class", "--api-server-count": "number of API servers"}
_ADDITIONAL = "--additional-config"


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", help="Name or local folder of the model, as vLLM takes it.")],
    probe: Annotated[list[Path], typer.Option("--probe", help="A probe file (.safetensors); once for each probe.")],
    capacity: Annotated[
        int | None, typer.Option("--capacity", min=1, help="Columns to reserve at each hook point, for later probes.")
    ] = None,
) -> None:
    """Serve a model by vLLM's OpenAI server, with scores of every token in its answers.

    All other arguments are vLLM's own: --port 8000, --tensor-parallel-size 2, and so on.
    """
    from lmprobe_tl.given_probes import as_probes
    from lmprobe_tl.live.scoring_plan import ScoringPlan
    from lmprobe_tl.vllm.structure import PROBES_VARIABLE, WORKER_CLASS, ResidualPoint, Structure, check_shape

    weights = as_probes([str(path) for path in probe])
    plan = ScoringPlan(weights)
    for name in plan.hooks:
        ResidualPoint.of(name)
    shape = local_shape(model)
    for one in weights if shape is not None else ():
        check_shape(one, *shape)  # type: ignore[misc]
    config, others = additional_config(context.args)
    config |= Structure.of(plan, capacity).to_config()
    if find_spec("vllm") is None:
        raise EngineError("vLLM is not installed in this environment; install it: pip install vllm.")
    os.environ[PROBES_VARIABLE] = json.dumps([str(path.resolve()) for path in probe])
    arguments = ["--model", model, "--worker-cls", WORKER_CLASS, "--additional-config", json.dumps(config)]
    # The first middleware is the innermost: the user's own see the scores, too.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, "--middleware", MIDDLEWARE, *others]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)  # its signals and its exit code are the server's own


def additional_config(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The user's own `--additional-config`, and vLLM's other arguments. InputError for one that the probes need."""
    found: dict[str, Any] = {}
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        option = _full_name(option)
        if option in _OURS:
            raise InputError(f"{option} is given, but with probes the {_OURS[option]} is fixed; leave it out.")
        if option.startswith(f"{_ADDITIONAL}."):
            raise InputError(f"{argument.split('=')[0]} is given; expected all of --additional-config as one JSON object.")
        if option != _ADDITIONAL:
            others.append(argument)
            continue
        text = value if equals else next(rest, "")
        try:
            found = json.loads(text)
        except ValueError:
            found = None  # type: ignore[assignment]
        if not isinstance(found, dict):
            raise InputError(f"--additional-config is {text!r}; expected a JSON object.")
    return found, others


def _full_name(option: str) -> str:
    """Of one that vLLM lets a user write with underlines, cut short, or in letters."""
    if option == "-asc":
        return "--api-server-count"
    name = option.replace("_", "-") if option.startswith("--") else option
    meant = [one for one in (*_OURS, _ADDITIONAL) if len(name) > len("--") and one.startswith(name)]
    return meant[0] if name.startswith("--") and meant else name
