"""One colour a score, on a scale that colour-blind readers can tell apart."""

from __future__ import annotations

import math

# Diverging, blue to orange over near-white (after the Okabe-Ito palette): both ends stay apart in all common colour
# blindness.
_LOW, _MIDDLE, _HIGH = (120, 180, 235), (245, 245, 240), (240, 160, 60)
# The same scale under light text, over a grey that is nearly black.
_DARK_LOW, _DARK_MIDDLE, _DARK_HIGH = (28, 88, 150), (42, 43, 46), (146, 76, 8)
# Logits this far from the threshold get the full colour.
_SPAN = 6.0


def score_share(logit: float, threshold_logit: float = 0.0) -> float:
    """Where a logit stands on the scale: -1 far below the threshold, 0 at it, 1 far above. Both may be infinite."""
    if logit == threshold_logit:
        return 0.0  # inf - inf would be NaN
    return math.tanh(2 * (logit - threshold_logit) / _SPAN)


def share_colour(share: float, *, dark: bool = False) -> str:
    """Colour '#rrggbb' of a place on the scale, from -1 (blue) over 0 (near-white, near-black if `dark`) to 1 (orange)."""
    low, centre, high = (_DARK_LOW, _DARK_MIDDLE, _DARK_HIGH) if dark else (_LOW, _MIDDLE, _HIGH)
    end = high if share > 0 else low
    mixed = (round(middle + abs(share) * (far - middle)) for middle, far in zip(centre, end, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def score_colour(logit: float, threshold_logit: float = 0.0) -> str:
    """Colour '#rrggbb' of a logit: near-white at the threshold, blue below, orange above."""
    return share_colour(score_share(logit, threshold_logit))


# Equal steps over the scale, of the 256 colours that most terminals have and of the eight that all coloured ones have. The
# nearest ones to the scale itself would be of many hues in the first case, and white for blue in the second.
_OF_256 = ("color(110)", "color(153)", "color(255)", "color(223)", "color(215)")
_OF_8 = ("cyan", "white", "yellow")


def palette_colour(share: float, n_colours: int) -> str:
    """The scale in a terminal's palette: rich's name of one of its 256 or 8 colours, for a place on the scale."""
    steps = _OF_256 if n_colours == 256 else _OF_8
    return steps[round((share + 1) / 2 * (len(steps) - 1))]
