"""Counters of the probes among those that vLLM's server tells at /metrics."""

from __future__ import annotations

from prometheus_client import Counter

from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.vllm import wire

_SCORED = Counter("lmprobe_tokens_scored", "Tokens that the probes have scored.")
_UNKNOWN = Counter("lmprobe_tokens_unknown", "Tokens without a score.")
_ALARMS = Counter("lmprobe_alarms", "Requests whose running score has reached the probe's threshold.", ["probe"])


class ProbeMetrics:
    """Follows the counts in the packets of one engine, which grow, and begin at 0 again where its probes are loaded anew."""

    def __init__(self, plan: ScoringPlan) -> None:
        self._alarms = [_ALARMS.labels(line.probe) for line in plan.watches.lines]
        self._scored = self._unknown = 0
        self._crossed = [0] * len(self._alarms)

    def __call__(self, packet: wire.Packet) -> None:
        _SCORED.inc(_more(packet.n_scored, self._scored))
        _UNKNOWN.inc(_more(packet.n_unknown, self._unknown))
        for counter, now, before in zip(self._alarms, packet.n_crossed, self._crossed, strict=False):
            counter.inc(_more(now, before))
        self._scored, self._unknown, self._crossed = packet.n_scored, packet.n_unknown, packet.n_crossed


def _more(now: int, before: int) -> int:
    return now - before if now >= before else now
