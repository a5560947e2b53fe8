"""One colour a score, on a scale that colour-blind readers can tell apart."""

from __future__ import annotations

import math

# Diverging, blue to orange over near-white (after the Okabe-Ito palette): both ends stay apart in all common colour
# blindness.
_LOW, _MIDDLE, _HIGH = (120, 180, 235), (245, 245, 240), (240, 160, 60)
# Logits this far from the threshold get the full colour.
_SPAN = 6.0


def score_colour(logit: float, threshold_logit: float = 0.0) -> str:
    """Colour '#rrggbb' of a logit: near-white at the threshold, blue below, orange above."""
    share = math.tanh(2 * (logit - threshold_logit) / _SPAN)
    end = _HIGH if share > 0 else _LOW
    mixed = (round(middle + abs(share) * (far - middle)) for middle, far in zip(_MIDDLE, end, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)
