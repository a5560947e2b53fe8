"""Scores into the choices of an answer, whole or chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.vllm.connection import ProbeConnection
from lmprobe_tl.vllm.inbox import ReceivedScores
from lmprobe_tl.vllm.results import alarm_of, by_probe, running_by_probe
from lmprobe_tl.vllm.server.request import ProbeRequest

_TOKEN_FIELDS = ("prompt_token_ids", "token_ids")


@dataclass
class _Choice:
    """prompt, generated: token ids so far, None where they are not told. n_sent, n_told: positions and alarms
    that the client has. n_unknown: of those positions, how many have no score."""

    prompt: list[int] | None = None
    generated: list[int] | None = None
    n_sent: int = 0
    n_told: int = 0
    n_unknown: int = 0
    first_alarm: str | None = None

    @property
    def tokens(self) -> list[int]:
        """Those that are known."""
        return [*(self.prompt or ()), *(self.generated or ())]

    @property
    def n_positions(self) -> int | None:
        """How many the tokens so far have: all but the last, which has not entered the model. None where it is not told."""
        return None if self.prompt is None or self.generated is None else max(len(self.tokens) - 1, len(self.prompt))


class ScoredAnswer:
    """The answer to one request: adds to each choice of it what the probes say, and what is new in a chunk of a stream.

    A choice that is finished gets all its positions: it waits for those that are still on their way.
    """

    def __init__(self, connection: ProbeConnection, request: ProbeRequest) -> None:
        self._connection, self._request = connection, request
        self._choices: dict[int, _Choice] = {}
        self._prompt: list[int] | None = None  # of a chat, told once for all choices

    async def add_scores(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The same answer, or chunk of one, as a JSON object."""
        self._prompt = answer.get("prompt_token_ids") or self._prompt
        self._hide_tokens(answer)
        for choice in answer.get("choices") or ():
            await self._add_to(choice)
            self._hide_tokens(choice)
        return answer

    async def _add_to(self, choice: dict[str, Any]) -> None:
        state = self._choices.setdefault(choice["index"], _Choice())
        state.prompt = choice.get("prompt_token_ids") or state.prompt or self._prompt
        if choice.get("token_ids") is not None:
            state.generated = [*(state.generated or ()), *choice["token_ids"]]
        inbox, (name, index) = self._connection.inbox, self._request.place_of(choice["index"])
        n_positions = state.n_positions
        ends = choice.get("finish_reason") is not None
        if ends and choice["finish_reason"] != "abort":
            await inbox.wait(name, index, n_positions)
            await self._connection.check_agreement()
        received = inbox.received(name).get(index) or ReceivedScores(self._connection.plan.n_columns)
        stop = received.n if n_positions is None else n_positions if ends else min(received.n, n_positions)
        choice |= self._new_scores(state, received, max(stop, state.n_sent))
        if ends and self._request.stop and state.first_alarm is not None:
            end = self._connection.end_token
            was_end = choice["finish_reason"] == "stop" if n_positions is None else state.tokens[-1:] == [end]
            choice["probe_stopped_by"] = state.first_alarm if was_end else None

    def _new_scores(self, state: _Choice, received: ReceivedScores, stop: int) -> dict[str, Any]:
        """Of positions from those that were sent to `stop`, and of crossings at positions before it."""
        plan = self._connection.plan
        logits = torch.full((stop - state.n_sent, plan.n_columns), torch.nan)
        found = torch.from_numpy(received.logits[state.n_sent : stop].copy())
        logits[: len(found)] = found
        state.n_sent = stop
        state.n_unknown += int((~logits.isfinite().all(dim=1)).sum())
        latest = torch.from_numpy(received.values[:stop][-1:].copy())
        running = {
            name: _plain(values)[-1] if len(values) else None for name, values in running_by_probe(plan, latest).items()
        }
        scores = {name: _plain(values) for name, values in by_probe(plan, logits).items()}
        return {
            **({"probe_scores": scores} if self._request.lists_scores else {}),
            "probe_running": running,
            "probe_alarms": self._new_alarms(state, received, stop),
            "probe_stopped_by": None,
            "probe_unknown": state.n_unknown,
        }

    def _new_alarms(self, state: _Choice, received: ReceivedScores, stop: int) -> list[dict[str, Any]]:
        crossings = sorted(received.crossings, key=lambda one: (one[1], one[0]))
        visible = [one for one in crossings if one[1] < stop]
        new, state.n_told = visible[state.n_told :], len(visible)
        tokens, alarms = state.tokens, []
        for crossing in new:
            is_known = crossing[1] < len(tokens)
            alarm = alarm_of(self._connection.plan, crossing, tokens[crossing[1]] if is_known else -1, row=0)
            alarms.append(
                {"probe": alarm.probe, "position": alarm.position}
                | ({"token_id": alarm.token_id} if is_known else {})
                | {"score": alarm.score, "threshold": alarm.threshold, "unit": alarm.unit}
            )
            state.first_alarm = state.first_alarm or alarm.probe
        return alarms

    def _hide_tokens(self, part: dict[str, Any]) -> None:
        """Token ids that the client did not ask for."""
        if not self._request.keeps_token_ids:
            part |= {name: None for name in _TOKEN_FIELDS if name in part}


def _plain(values: Tensor) -> list[Any]:
    """As JSON knows it: null for NaN."""
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [value if known else None for value, known in zip(values.tolist(), values.isfinite().tolist(), strict=True)]
