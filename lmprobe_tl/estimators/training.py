"""Training by AdamW on batches of whole token sequences, with early stopping on sequences that are held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.ragged import Segments
from lmprobe_tl.estimators.token_scaling import TokenScaling
from lmprobe_tl.estimators.token_sequences import TokenSequences
from lmprobe_tl.splits import held_out

Indices: TypeAlias = NDArray[np.int64]

MOST_BATCH_TOKENS = 16_384
STEPS_AN_EPOCH = 32


@dataclass(frozen=True)
class Epoch:
    """One epoch of training: its mean loss a sequence, over the steps and afterwards on what is held out.

    stage: 1, or the order that a polynomial trains. Epoch 0 is the start, before any step, with a training loss of NaN.
    validation_loss: NaN where nothing is held out.
    """

    stage: int
    epoch: int
    training_loss: float
    validation_loss: float


@dataclass(frozen=True, eq=False)
class Batch:
    """Some sequences: tokens [n_tokens d] float32, one sequence after another, targets [n], weight [n] float32."""

    tokens: Tensor
    segments: Segments
    targets: Tensor
    weight: Tensor


Losses: TypeAlias = Callable[[Batch], Tensor]  # the loss of each sequence [n]


@dataclass(frozen=True)
class Schedule:
    """How to train; the parameters of the same names of `TorchClassifier`."""

    learning_rate: float
    weight_decay: float
    max_epochs: int
    patience: int
    batch_tokens: int | None
    progress: bool


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Examples parted into those to learn from and those held out, and the scaling of their tokens.

    targets: [n] float for two classes (0 and 1), int64 for more; weight: [n]; learnt, held: indices, held may be empty.
    n_outputs: logits of an example, 1 for two classes.
    generator: orders the batches, and whatever else a fit draws.
    """

    sequences: TokenSequences
    targets: Tensor
    weight: Tensor
    n_outputs: int
    learnt: Indices
    held: Indices
    scaling: TokenScaling
    device: torch.device
    generator: torch.Generator

    def batch_tokens(self, wanted: int | None) -> int:
        """Tokens a step: those wanted, or so many that an epoch has about 32 steps of 16 sequences or more, below 16,384."""
        if wanted is not None:
            return wanted
        lengths = self.sequences.lengths[self.learnt]
        return min(MOST_BATCH_TOKENS, max(math.ceil(lengths.sum() / STEPS_AN_EPOCH), math.ceil(16 * lengths.mean())))

    def batches(self, indices: Indices, batch_tokens: int) -> Iterator[Batch]:
        """These examples in this order, each batch at most one sequence larger than batch_tokens."""
        ends = self.sequences.lengths[indices].cumsum()
        cuts = np.flatnonzero(np.diff((ends - 1) // batch_tokens)) + 1
        return (self._batch(part) for part in np.split(indices, cuts))

    def shuffled(self) -> Indices:
        """The examples to learn from, in a new order."""
        return self.learnt[torch.randperm(len(self.learnt), generator=self.generator).numpy()]

    def _batch(self, indices: Indices) -> Batch:
        values = self.sequences.tensor
        segments = Segments(torch.from_numpy(self.sequences.lengths[indices]))
        starts = torch.from_numpy(self.sequences.offsets[indices])
        tokens = (starts[segments.of_token] + segments.place).to(values.device)
        rows = torch.from_numpy(indices)
        return Batch(
            values.index_select(0, tokens).to(self.device, torch.float32),
            Segments(segments.lengths.to(self.device)),
            self.targets[rows].to(self.device),
            self.weight[rows].to(self.device),
        )


def split(labels: NDArray[Any], groups: NDArray[Any] | None, share: float, seed: int) -> tuple[Indices, Indices]:
    """Indices to learn from and to hold out, about `share` of each class; no group is in both. Share 0 holds out nothing.

    Where a class is in few groups, a larger share is held out, up to a half. Raises InputError where a class has one example
    or is in one group.
    """
    everything = np.arange(len(labels))
    if share == 0:
        return everything, everything[:0]
    if groups is not None and len(np.unique(groups)) < len(groups):
        fewest = min(len(np.unique(groups[labels == label])) for label in np.unique(labels))
        try:
            learnt, held = held_out(labels, groups, max(share, 1 / max(2, fewest)), seed)
        except InputError as error:
            raise InputError(f"Nothing can be held out for early stopping: {error} Or use validation_fraction=0.") from error
        return np.sort(learnt), np.sort(held)
    rng = np.random.RandomState(seed)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise InputError(
                f"Class {label.item()!r} has one example (n_samples = {len(labels)}), so none can be held out for early "
                "stopping. Give more examples, or validation_fraction=0."
            )
        chosen.append(rng.permutation(members)[: max(1, round(share * len(members)))])
    held = np.sort(np.concatenate(chosen))
    return np.setdiff1d(everything, held), held


def minimise(
    parameters: Sequence[Tensor], losses: Losses, data: TrainingSet, schedule: Schedule, *, stage: int = 1
) -> tuple[Epoch, ...]:
    """Train the parameters in place, and leave them as of the epoch with the lowest validation loss, the start included.

    Stops after `patience` epochs without a lower one. Where nothing is held out, the last epoch stays. Biases, that is
    parameters of one axis, do not decay. Raises InputError where the loss is no longer finite.
    """
    batch_tokens = data.batch_tokens(schedule.batch_tokens)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate)
    history = [Epoch(stage, 0, math.nan, _validation_loss(losses, data, batch_tokens))]
    best, kept = history[0], [p.detach().clone() for p in parameters]
    with tqdm(total=schedule.max_epochs, desc="epochs", disable=not schedule.progress) as bar:
        for number in range(1, schedule.max_epochs + 1):
            training_loss = _one_epoch(losses, data, batch_tokens, optimizer)
            epoch = Epoch(stage, number, training_loss, _validation_loss(losses, data, batch_tokens))
            if not math.isfinite(training_loss):
                raise InputError(f"The training loss became {training_loss} in epoch {number}: use a lower learning_rate.")
            history.append(epoch)
            bar.update()
            bar.set_postfix(training=f"{training_loss:.4f}", validation=f"{epoch.validation_loss:.4f}")
            if not epoch.validation_loss >= best.validation_loss:  # NaN, where nothing is held out, is no stop either
                best, kept = epoch, [p.detach().clone() for p in parameters]
            elif number - best.epoch >= schedule.patience:
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return tuple(history)


def _one_epoch(losses: Losses, data: TrainingSet, batch_tokens: int, optimizer: torch.optim.Optimizer) -> float:
    total, weight = 0.0, 0.0
    for batch in data.batches(data.shuffled(), batch_tokens):
        loss = (batch.weight * losses(batch)).sum()
        optimizer.zero_grad()
        (loss / len(batch.weight)).backward()
        optimizer.step()
        total, weight = total + loss.item(), weight + batch.weight.sum().item()
    return total / weight


def _validation_loss(losses: Losses, data: TrainingSet, batch_tokens: int) -> float:
    if not len(data.held):
        return math.nan
    total, weight = 0.0, 0.0
    with torch.no_grad():
        for batch in data.batches(data.held, batch_tokens):
            total += (batch.weight * losses(batch)).sum().item()
            weight += batch.weight.sum().item()
    return total / weight if math.isfinite(total) else math.inf
