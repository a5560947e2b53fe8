"""A running engine's probes from its client's side: loaded into the workers, and their scores received."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from lmprobe_tl.errors import EngineError
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.vllm import wire
from lmprobe_tl.vllm.inbox import ScoreInbox
from lmprobe_tl.vllm.probes import check_agreement, check_fits_model, check_loaded, load_message
from lmprobe_tl.weights import ProbeWeights


class ProbeConnection:
    """What `connect` returns. end_token: what ends a request at an alarm; can_stop: whether the engine is able to."""

    def __init__(self, client: Any, plan: ScoringPlan, inbox: ScoreInbox, can_stop: bool, end_token: int | None) -> None:
        self.plan, self.inbox, self.can_stop, self.end_token = plan, inbox, can_stop, end_token
        self._client = client
        self._agreement: asyncio.Task[None] | None = None

    async def check_agreement(self) -> None:
        """EngineError where workers have computed different scores. Asks them once, after the first request, and again only
        where they did not answer."""
        if self._agreement is None:
            self._agreement = asyncio.create_task(self._agree())
        asked = self._agreement
        try:
            await asyncio.shield(asked)
        except EngineError:
            raise
        except Exception:
            if self._agreement is asked:
                self._agreement = None
            raise

    async def _agree(self) -> None:
        check_agreement(await states_of(self._client))

    async def close(self) -> None:
        """Receive no more scores. The engine runs on."""
        await self.inbox.close()


async def connect(
    client: Any, probes: Sequence[ProbeWeights], on_packet: Callable[[wire.Packet], None] | None = None
) -> ProbeConnection:
    """Load probes into the engine of an `AsyncLLM`, and have it publish their scores to this process.

    Raises IncompatibleProbeError where a probe does not fit the model, EngineError where the workers cannot run them.
    """
    config = client.vllm_config
    tokenizer = None if config.model_config.skip_tokenizer_init else client.get_tokenizer()
    if inspect.isawaitable(tokenizer):
        tokenizer = await tokenizer
    check_fits_model(probes, config, tokenizer)
    plan = ScoringPlan(probes)
    message = load_message(plan, getattr(tokenizer, "bos_token_id", None))
    on_last_stage = check_loaded(await client.collective_rpc("lmprobe_load", args=(message,)), plan)
    can_stop = on_last_stage and getattr(tokenizer, "eos_token_id", None) is not None
    inbox = ScoreInbox(plan.n_columns, on_packet)
    try:
        await client.collective_rpc("lmprobe_publish", args=(wire.encode(wire.Publish(inbox.address)),))
    except BaseException:
        await inbox.close()
        raise
    return ProbeConnection(client, plan, inbox, can_stop, getattr(tokenizer, "eos_token_id", None))


async def states_of(client: Any) -> list[wire.State]:
    return [wire.decode(answer, wire.State) for answer in await client.collective_rpc("lmprobe_state")]
