"""What follows from a probe's metrics and controls, in plain words."""

from __future__ import annotations

from collections.abc import Mapping

from lmprobe_tl.measures import Difference, Measure
from lmprobe_tl.probe_report import Conclusion, ControlReport, GroupReport

# What a control is called in a sentence, and what it means not to beat it.
CONTROL_WORDS = {
    "bag_of_words": ("the bag of words", "Which words a text holds {tells} as much, so the probe may read just these."),
    "layer_0": ("the embedding (layer 0)", "The tokens by themselves {tell} as much as what the model computes."),
    "length": ("length alone", "How long a text is {tells} as much, so the probe may read just that."),
    "group": ("the group alone", "Which group a prompt comes from {tells} as much, so the probe may read just the group."),
    "random_direction": ("random directions", "Any direction at this hook point {tells} as much as the probe's."),
    "shuffled_labels": ("shuffled labels", "A probe that learnt from wrong labels {does} as well."),
}
_IS_AS_GOOD = {"tells": "tells", "tell": "tell", "does": "does"}
_MAY_BE_AS_GOOD = {"tells": "may tell", "tell": "may tell", "does": "may do"}


def verdict(
    auroc: Measure,
    controls: Mapping[str, ControlReport],
    left_out: Mapping[str, str],
    groups: Mapping[str, GroupReport],
    worst_group: str | None,
    n_trained_on: int | None,
    n_prompts: int,
) -> tuple[Conclusion, str]:
    """A conclusion and its reasons; AUROC decides. worst_group: of those with an AUROC, if there are several."""
    conclusion, lines = _conclusion(auroc, controls, _leaks(controls, n_trained_on, n_prompts))
    if left_out and conclusion != "leakage":
        named = ", ".join(CONTROL_WORDS[name][0] for name in left_out)
        lines.append(f"Nothing is known of {named}: these controls did not run.")
    if groups and all(one.metrics["auroc"].value is None for one in groups.values()):
        lines.append("No group holds both classes, so the probe may tell the groups apart and not the labels.")
    worst = None if worst_group is None else groups[worst_group].metrics["auroc"]
    if worst is not None and worst.low is not None and worst.low <= 0.5:
        band = _band(worst.value, worst.low, worst.high)
        lines.append(f"In the group {worst_group!r} the probe is not clearly above chance: AUROC {band}.")
    return conclusion, " ".join(lines)


def _conclusion(auroc: Measure, controls: Mapping[str, ControlReport], leaks: list[str]) -> tuple[Conclusion, list[str]]:
    compared = {name: one.differences["auroc"] for name, one in controls.items() if "auroc" in one.differences}
    unbeaten = {name: one for name, one in compared.items() if one.low is not None and not one.is_above_zero}
    lines = list(leaks)
    if auroc.low is not None and auroc.low <= 0.5:
        lines.append(f"The probe is not clearly above chance: AUROC {_band(auroc.value, auroc.low, auroc.high)}.")
    if leaks:
        unbeaten.pop("shuffled_labels", None)  # said already
    lines += [_unbeaten(name, one, auroc, controls[name]) for name, one in unbeaten.items()]
    if lines:
        return "leakage" if leaks else "does not beat its controls", lines
    if auroc.value is None:
        return "undecided", [f"There is no AUROC to go by: {auroc.note}."]
    if not compared:
        return "undecided", ["No control ran, so nothing says whether the probe reads more than words, length or chance."]
    unknown = [name for name, one in compared.items() if one.low is None]
    if unknown:
        named = ", ".join(CONTROL_WORDS[name][0] for name in unknown)
        return "undecided", [f"Too few prompts to tell whether the probe beats {named}: a class is in fewer than five."]
    closest = min(compared, key=lambda name: compared[name].value)
    count = f"every control that ran ({len(compared)})" if len(compared) > 1 else CONTROL_WORDS[closest][0]
    told = f"The closest is {CONTROL_WORDS[closest][0]}: difference {_shown(compared[closest])}."
    return "beats its controls", [f"The probe beats {count} on AUROC. {told}"]


def _leaks(controls: Mapping[str, ControlReport], n_trained_on: int | None, n_prompts: int) -> list[str]:
    lines = []
    if n_trained_on:
        lines.append(
            f"Leakage: {n_trained_on:,} of the {n_prompts:,} judged prompts are training prompts too; what they say holds "
            "for no new text."
        )
    shuffled = controls.get("shuffled_labels")
    if shuffled is not None and shuffled.above_chance is not None and shuffled.above_chance.is_above_zero:
        reached = 0.5 + shuffled.above_chance.value
        lines.append(
            f"Leakage: fitted on shuffled labels, the probe still reaches an AUROC of {reached:.3f}, where chance is 0.5. "
            "Something beside the training labels tells it the answers."
        )
    return lines


def _unbeaten(name: str, difference: Difference, auroc: Measure, control: ControlReport) -> str:
    words, meaning = CONTROL_WORDS[name]
    # An interval on both sides of 0 does not say that the control is as good.
    verbs = _IS_AS_GOOD if difference.high is not None and difference.high <= 0 else _MAY_BE_AS_GOOD
    return (
        f"The probe does not beat {words}: AUROC {auroc.value:.3f} against {control.metrics['auroc'].value:.3f}, difference "
        f"{_shown(difference)}. {meaning.format(**verbs)}"
    )


def _shown(difference: Difference) -> str:
    return _band(difference.value, difference.low, difference.high, "+")


def _band(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
