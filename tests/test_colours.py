"""The scale of scores: from blue over near-white to orange, which readers of any colour vision can tell apart."""

from __future__ import annotations

import math
import re
from itertools import combinations

import numpy as np
import pytest
from rich.color import Color

from lmprobe_tl.colours import palette_colour, score_colour, score_share, share_colour

# Machado, Oliveira and Fernandes (2009), A Physiologically-based Model for Simulation of Color Vision Deficiency, IEEE TVCG
# 15(6): their matrices of full severity, for linear RGB.
VISIONS = {
    "usual": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# A just noticeable difference is about 2.3.
WELL_APART = 20.0
FULL = [share_colour(share) for share in (-1, 0, 1)]
PALETTE = [palette_colour(share, 256) for share in (-1, 0, 1)]


def rgb(colour: str) -> np.ndarray:
    return np.array(Color.parse(colour).get_truecolor()) / 255


def linear(colour: str) -> np.ndarray:
    """Linear RGB of sRGB, as IEC 61966-2-1 has it."""
    value = rgb(colour)
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB, for D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = to_xyz @ light / (to_xyz @ np.ones(3))
    f = [math.cbrt(t) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def difference(one: str, other: str, vision: str) -> float:
    """Colour difference of CIE 1976 (Delta E*ab) for a reader with this vision."""
    seen = [lab(np.clip(VISIONS[vision] @ linear(colour), 0, 1)) for colour in (one, other)]
    return float(np.linalg.norm(seen[0] - seen[1]))


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2.1."""
    low, high = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("scale", [FULL, PALETTE], ids=["full", "256 colours"])
def test_ends_and_middle_are_well_apart_for_every_colour_vision(scale: list[str], vision: str) -> None:
    for one, other in combinations(scale, 2):
        assert difference(one, other, vision) > WELL_APART


def test_red_and_green_would_not_be() -> None:
    red, green = "#d62728", "#2ca02c"
    assert difference(red, green, "usual") > 100
    assert difference(red, green, "deuteranopia") < WELL_APART / 2


@pytest.mark.parametrize("matrix", VISIONS.values(), ids=VISIONS)
def test_every_colour_vision_leaves_grey_as_it_is(matrix: np.ndarray) -> None:
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=2e-6)


def test_black_text_is_readable_on_the_whole_scale() -> None:
    for share in np.linspace(-1, 1, 101):
        assert contrast(share_colour(share), "#000000") >= 4.5
        assert contrast(palette_colour(share, 256), "#000000") >= 4.5
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#0000ee", "#000000") < 4.5


def test_colours_run_from_blue_over_near_white_to_orange_and_saturate() -> None:
    def channels(logit: float) -> tuple[int, ...]:
        code = score_colour(logit, 1.0)
        assert re.fullmatch("#[0-9a-f]{6}", code)
        return tuple(int(code[at : at + 2], 16) for at in (1, 3, 5))

    assert min(channels(1.0)) > 230
    red, _, blue = channels(-20.0)
    assert blue > red + 80
    red, _, blue = channels(20.0)
    assert red > blue + 80
    assert channels(1e9) == channels(1000.0) == channels(float("inf"))
    assert all(channels(logit)[0] > channels(logit)[2] + 5 for logit in (1.2, 2.0, 3.0))
    assert all(channels(logit)[0] < channels(logit)[2] - 5 for logit in (0.0, -1.0, -3.0))
    reds = [channels(logit)[0] for logit in (-5.0, -3.0, -1.0, 0.0, 1.0)]
    assert reds == sorted(reds)
    assert len(set(reds)) == 5
    blues = [channels(logit)[2] for logit in (1.0, 2.0, 4.0, 7.0)]
    assert blues == sorted(blues, reverse=True)
    assert len(set(blues)) == 4


def test_the_share_is_zero_at_the_threshold_and_has_the_sign_of_the_distance() -> None:
    inf = math.inf
    assert [score_share(at, at) for at in (-3.0, 0.0, 2.5, inf, -inf)] == [0.0] * 5
    assert [score_share(-inf, 0.0), score_share(inf, 0.0), score_share(0.0, inf), score_share(0.0, -inf)] == [-1, 1, -1, 1]
    for threshold in (-4.0, 0.0, 7.0):
        shares = [score_share(threshold + distance, threshold) for distance in (-9, -1, -1e-9, 1e-9, 1, 9)]
        assert shares == sorted(shares)
        assert [math.copysign(1, share) for share in shares] == [-1, -1, -1, 1, 1, 1]


def test_few_colours_are_equal_steps_of_the_scale() -> None:
    for n_colours, n_steps in ((256, 5), (8, 3)):
        steps = list(dict.fromkeys(palette_colour(share, n_colours) for share in np.linspace(-1, 1, 401)))
        assert len(steps) == n_steps
        assert steps[n_steps // 2] == palette_colour(0.0, n_colours)
        assert steps[:: n_steps - 1] == [palette_colour(-1.0, n_colours), palette_colour(1.0, n_colours)]
