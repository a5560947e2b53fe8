"""What all classifiers trained with torch share: parameters, validation of inputs, training, and decisions."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from lmprobe_tl.checked_record import require
from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.fitted_head import FittedHead
from lmprobe_tl.estimators.logit_classifier import LogitClassifier
from lmprobe_tl.estimators.sample_weight import validated_weight
from lmprobe_tl.estimators.threads import training_threads
from lmprobe_tl.estimators.token_scaling import check_finite, token_scaling
from lmprobe_tl.estimators.token_sequences import TokenSequences
from lmprobe_tl.estimators.training import MOST_BATCH_TOKENS, Epoch, Schedule, TrainingSet, split

Array = NDArray[np.float64]

READING_ELEMENTS = 2**22  # 32 MiB of float64 at a time


@dataclass(eq=False, repr=False, kw_only=True)
class TorchClassifier(LogitClassifier):
    """Base of the classifiers trained by AdamW with early stopping.

    learning_rate, weight_decay: of AdamW, on standardised features; biases do not decay. No values are best for all kinds
    and data: try more decay where many tokens carry a little each, and less where there are many examples. Where best_epoch_
    is 1 or 2 the rate is too high, and where it is the last epoch too low.
    max_epochs, patience: the fit ends after `patience` epochs without a lower validation loss, and keeps the best epoch.
    batch_tokens: about so many tokens a step, in whole sequences; None for 32 steps an epoch, or more of 16,384 tokens.
    validation_fraction: share of each class held out for early stopping, in whole groups; 0 holds out nothing, and the
    last epoch stays.
    standardize: learn on features with mean 0 and deviation 1 over the training tokens; what is learnt is of unscaled ones.
    random_state: an int, a numpy RandomState, or None for a seed from the system. Equal seeds give equal results on one
    device; on the CPU with any number of threads where steps are small, since these take one, see `training_threads`.
    Neither torch's nor numpy's own generators are used or moved.
    device: 'auto' (CUDA where there is one), 'cpu', 'cuda', 'cuda:1', ... progress: show a bar of epochs.

    Classes are left as frequent as they are: give sample_weight to balance them.

    Learnt: classes_; n_features_in_; history_, a tuple of `Epoch`; n_epochs_, the epochs trained; best_epoch_, the one kept,
    and validation_loss_, its loss; head_, a `FittedHead`.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    max_epochs: int = 50
    patience: int = 10
    batch_tokens: int | None = None
    validation_fraction: float = 0.2
    standardize: bool = True
    random_state: Any = None
    device: str = "auto"
    progress: bool = False

    def fit(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> TorchClassifier:
        """Learn from examples X and their labels y [n].

        sample_weight: [n] or None; an example of weight 0 takes no part. groups: [n] or None; no group is both learnt from
        and held out. Raises InputError for what cannot be used, and where nothing can be held out;
        warns where no epoch lowered the validation loss, so that the start is kept, which has learnt nothing.
        """
        self._check_parameters()
        sequences, y = self._examples_and_labels(X, y)
        weight = validated_weight(sample_weight, len(sequences))
        if groups is not None and np.shape(groups) != (len(sequences),):
            raise InputError(f"groups has shape {np.shape(groups)}, expected one group an example: {(len(sequences),)}.")
        used = np.flatnonzero(weight > 0)
        classes = np.unique(y[used])
        self._check_classes(classes)
        seed = _seed(self.random_state)
        class_index = np.searchsorted(classes, y[used])
        learnt, held = (
            used[part]
            for part in split(y[used], None if groups is None else np.asarray(groups)[used], self.validation_fraction, seed)
        )
        learnt_weight = np.zeros(len(weight))
        learnt_weight[learnt] = weight[learnt]
        targets = torch.zeros(len(sequences), dtype=torch.float32 if len(classes) == 2 else torch.int64)
        targets[torch.from_numpy(used)] = torch.from_numpy(class_index).to(targets.dtype)
        schedule, device, (n_tokens, d) = self._schedule(), usable_device(self.device), sequences.values.shape
        step_tokens = schedule.batch_tokens or min(n_tokens, MOST_BATCH_TOKENS)
        with training_threads(step_tokens * d, device), torch.inference_mode(False), torch.enable_grad():
            data = TrainingSet(
                sequences=sequences,
                targets=targets,
                weight=torch.from_numpy(weight / weight[learnt].mean()).float(),
                n_outputs=1 if len(classes) == 2 else len(classes),
                learnt=learnt,
                held=held,
                scaling=token_scaling(sequences, learnt_weight, standardize=self.standardize),
                device=device,
                generator=torch.Generator().manual_seed(seed),
            )
            head, history = self._train(data, schedule)
        # all at the end: a fit that is broken off leaves what an earlier one has learnt
        self.classes_, self.head_, self.history_ = classes, head, history
        self.n_epochs_ = sum(epoch.epoch > 0 for epoch in history)
        best = _best(history, history[-1].stage)
        self.best_epoch_, self.validation_loss_ = best.epoch, best.validation_loss
        if len(held) and _best(history, 1).epoch == 0:
            warnings.warn(
                f"{type(self).__name__} has learnt nothing: in {self.n_epochs_} epochs the validation loss was never below "
                f"that of the start. Either the {len(held)} examples held out of {len(used)} are too few, or nothing in the "
                "features tells the classes apart. Give more examples, or try another learning_rate.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "head_")

    def _train(self, data: TrainingSet, schedule: Schedule) -> tuple[FittedHead, tuple[Epoch, ...]]:
        raise NotImplementedError

    def _own_limits(self) -> None:
        """Check the parameters of the class itself; InputError."""

    def _examples(self, X: Any) -> TokenSequences:
        """X of a fitted classifier as sequences, those of one token for vectors."""
        check_is_fitted(self)
        return vectors(validate_data(self, X, dtype=_FLOATS, reset=False))

    def _examples_and_labels(self, X: Any, y: Any) -> tuple[TokenSequences, NDArray[Any]]:
        X, y = validate_data(self, X, y, dtype=_FLOATS)
        check_classification_targets(y)
        return vectors(X), y

    def _check_classes(self, classes: NDArray[Any]) -> None:
        if len(classes) < 2:
            raise InputError(
                f"A classifier needs at least two classes, but the labels hold one class with weight: {classes}."
            )
        if len(classes) > 2 and not self.__sklearn_tags__().classifier_tags.multi_class:
            raise InputError(
                "Only binary classification is supported. The type of the target is multiclass: "
                f"{type(self).__name__} tells two classes apart, the labels hold {len(classes)}: {classes}. "
                "For more use MlpClassifier, or a linear classifier."
            )

    def _check_parameters(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        decay = self.weight_decay
        require(_is_number(decay) and 0 <= decay < float("inf"), "weight_decay", decay, "a finite number, 0 or more")
        for name in ("max_epochs", "patience", "batch_tokens"):
            value = getattr(self, name)
            if name != "batch_tokens" or value is not None:
                check_whole(name, value)
        share = self.validation_fraction
        require(_is_number(share) and 0 <= share <= 0.5, "validation_fraction", share, "a number from 0 to 0.5")
        self._own_limits()

    def _schedule(self) -> Schedule:
        return Schedule(
            self.learning_rate, self.weight_decay, self.max_epochs, self.patience, self.batch_tokens, self.progress
        )


_FLOATS = (np.float64, np.float32, np.float16)


def vectors(X: NDArray[Any]) -> TokenSequences:
    """Rows [n d] as sequences of one token each, without a copy."""
    return TokenSequences(X, np.arange(len(X) + 1))


def readings_of(head: FittedHead, sequences: TokenSequences, start: int, stop: int) -> Tensor:
    """Readings [stop-start n_readings] of the tokens from `start` to `stop`, in float64; InputError where not finite."""
    direction, intercept = torch.from_numpy(head.direction).T, torch.from_numpy(head.intercept)
    size = max(1, READING_ELEMENTS // len(direction))
    readings = torch.empty(stop - start, len(intercept), dtype=torch.float64)
    for at in range(start, stop, size):
        block = sequences.tensor[at : min(at + size, stop)].cpu().double()
        torch.addmm(intercept, block, direction, out=readings[at - start : at - start + len(block)])
    check_finite(readings, start, sequences)
    return readings


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """InputError for what is no whole number from `least` on, or up to `most`."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    expected = f"a whole number, {least} or more" if most is None else f"a whole number from {least} to {most}"
    require(is_whole and value >= least and (most is None or value <= most), name, value, expected)


def check_positive(name: str, value: Any) -> None:
    require(_is_number(value) and 0 < value < float("inf"), name, value, "a finite number above 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _seed(random_state: Any) -> int:
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1)[0] >> 1)
    return int(check_random_state(random_state).randint(2**31 - 1))


def _best(history: tuple[Epoch, ...], stage: int) -> Epoch:
    """The epoch that a stage keeps: that of the lowest validation loss, or the last one where nothing is held out."""
    epochs = [epoch for epoch in history if epoch.stage == stage]
    return epochs[-1] if math.isnan(epochs[0].validation_loss) else min(epochs, key=lambda epoch: epoch.validation_loss)


def usable_device(name: Any) -> torch.device:
    """The device of that name, 'auto' being CUDA where there is one; InputError where nothing can be trained on it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device is {name!r}; expected 'auto', 'cpu' or 'cuda'.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {name!r}, but torch finds no CUDA device here; use 'auto' or 'cpu'.")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device is {name!r}, where torch cannot compute here ({error}); use 'auto' or 'cpu'.") from error
    return device
