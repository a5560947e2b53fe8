"""The causal check of a probe: its direction added to the residual stream, or taken out of it, while the model runs.

A direction from which a label can be read need not be one that the model uses. Where it is used, taking it out changes what
the model does more than taking out a random direction of the same norm.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, get_args

from lmprobe_tl.errors import InputError, NothingChangedWarning
from lmprobe_tl.hook_points import ForwardWatch, HookPoints, load_model, resolve_hook_points
from lmprobe_tl.live.change import Change
from lmprobe_tl.live.chosen_positions import ChosenPositions, Positions
from lmprobe_tl.live.edit import Edit
from lmprobe_tl.live.editor import Editor
from lmprobe_tl.live.targets import Target, Unit, additions, projections, targets_of
from lmprobe_tl.probe_spec import Label


def steer(
    model: Any,
    direction: Any,
    *,
    coefficient: float,
    unit: Unit = "norm",
    label: Label | None = None,
    hook_points: HookPoints | None = None,
    positions: Positions = "all",
    include_bos: bool = False,
    strict: bool = False,
) -> AbstractContextManager[Change]:
    """Add a direction to the residual stream in every forward pass inside the block; `as` gives the `Change` that it made.

    direction: one linear probe (`ProbeWeights`, a fitted `Probe`, the path of a file), or a tensor [d_model].
    coefficient: how much is added at each position, in `unit`; a negative one steers away.
    unit: 'norm' adds a vector of that length (the Euclidean norm, in the scale of the activations; activation addition by
    `k * vector` is `coefficient=k * vector.norm()`). 'logit' adds the shortest vector that moves the probe's logit by
    `coefficient` at the hook point; with several hook points, that moves the sum of their parts, not counting what a change
    does to later ones.
    label: the class to steer towards; None is the positive one, `labels[1]`. With more than two classes it must be given and
    says whose logit is meant.
    hook_points: where to add it instead of the probe's own hook point; the whole coefficient at each. A tensor needs it.
    positions: 'all'; 'prompt'; or 'generated', the sampled tokens (the first of which still comes from an unchanged prompt).
    Outside of `generate`, a forward pass over one column that goes on from a cache is generated, and so is the last column
    of one without a cache that repeats the tokens of the pass before and adds it; all else is prompt.
    Pads never change, nor does a BOS with which a row begins, unless include_bos.
    strict: an error instead of a ModelMismatchWarning where a probe file names another model or tokenizer.

    Hooks on one hook point act in the order in which their blocks were entered: `attach_probes` inside this block scores the
    steered activations there, outside of it the unsteered ones, and at later hook points always what follows from steering.
    The change is computed in float32 and rounded to the model's dtype; the report is of what then really changed.

    Raises InputError or IncompatibleProbeError before anything runs (or in the first forward pass, for another residual
    basis), ProbeNeverFiredError where a hook point was not reached, MonitorError where positions cannot be told apart (beam
    search, a padded prompt without a mask); warns NothingChangedWarning where no activation changed.

    >>> with steer(model, weights, coefficient=4.0) as change:  # doctest: +SKIP
    ...     model.generate(tokens, attention_mask=mask)
    >>> change["blocks.6.hook_resid_post"].ratio  # doctest: +SKIP
    0.31
    """
    if isinstance(direction, (list, tuple)):
        raise InputError("steer takes one direction; nest a block in another to add several.")
    if unit not in get_args(Unit):
        raise InputError(
            f"unit is {unit!r}; expected 'norm' (length of what is added) or 'logit' (shift of the probe's logit)."
        )
    if isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)) or not math.isfinite(coefficient):
        raise InputError(f"coefficient is {coefficient!r}; expected a finite number.")
    model = load_model(model)
    return _edited(
        model,
        direction,
        lambda targets: additions(targets[0], coefficient, unit, label),
        hook_points,
        positions,
        include_bos=include_bos,
        strict=strict,
    )


def ablate(
    model: Any,
    directions: Any,
    *,
    to: float | None = None,
    hook_points: HookPoints | None = None,
    positions: Positions = "all",
    include_bos: bool = False,
    strict: bool = False,
) -> AbstractContextManager[Change]:
    """Project directions out of the residual stream in every forward pass inside the block; `as` gives the `Change`.

    Directional ablation (Arditi et al. 2024, arXiv:2406.11717): x becomes x - W+ W x, where W holds the directions as rows
    and W+ is its pseudoinverse, so that there every position gets the same logits, the probe's intercepts.

    directions: a linear probe or a list of them, or a tensor [d_model] or [n d_model]. All rows of a probe with several
    classes are projected out, and all probes at one hook point together.
    to: the logit that each position shall have instead of the intercept, which may lie far outside the usual logits: 0 is
    the probe's decision boundary, the mean logit of a data set is mean ablation. For probes with two classes and one hook
    point; of a tensor it is the component along each row.
    hook_points: where instead of at the probe's own; 'all' is after every block. What follows may write the direction anew.
    To keep it out of the stream altogether, name all that writes into it: 'hook_embed' (with 'hook_pos_embed', where the
    model has one), every 'blocks.{i}.hook_attn_out' and 'blocks.{i}.hook_mlp_out'.

    positions, include_bos, strict, the order of hooks, errors and warnings are as in `steer`.

    >>> with ablate(model, weights, hook_points="all") as change:  # doctest: +SKIP
    ...     ablated = model(tokens, attention_mask=mask)
    """
    if to is not None and (isinstance(to, bool) or not isinstance(to, (int, float)) or not math.isfinite(to)):
        raise InputError(f"to is {to!r}; expected a finite number, or None to project the directions out.")
    model = load_model(model)
    return _edited(
        model,
        directions,
        lambda targets: projections(model, targets, to),
        hook_points,
        positions,
        include_bos=include_bos,
        strict=strict,
    )


@contextmanager
def _edited(
    model: Any,
    given: Any,
    edits_of: Callable[[list[Target]], dict[str, Edit]],
    hook_points: HookPoints | None,
    positions: Positions,
    *,
    include_bos: bool,
    strict: bool,
) -> Iterator[Change]:
    where = None if hook_points is None else resolve_hook_points(model, hook_points)
    targets = targets_of(model, given, where, strict=strict)
    chosen = ChosenPositions(model, positions, include_bos=include_bos)
    editor = Editor(model, edits_of(targets), chosen, [probe for target in targets for probe in target.probes])
    change = editor.change
    with ExitStack() as stack:
        stack.callback(ForwardWatch(model, editor.before_forward, editor.after_forward).remove)
        stack.callback(editor.detach)
        editor.attach(model)
        yield change
        editor.check_fired()
    if change.is_nothing:
        counted = any(one.n_positions for one in change.values())
        reason = "the activations were so already" if counted else f"no position counted with positions={positions!r}"
        message = f"nothing was changed at {', '.join(change)}: {reason}."
        warnings.warn(message, NothingChangedWarning, stacklevel=3)
