"""Classifiers of vectors that bend: a hidden layer, and a polynomial that can be cut short."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.fitted_head import FittedHead
from lmprobe_tl.estimators.torch_classifier import Array, TorchClassifier, check_whole, readings_of
from lmprobe_tl.estimators.training import Batch, Epoch, Schedule, TrainingSet, minimise
from lmprobe_tl.heads import ReadoutHead, polynomial_orders
from lmprobe_tl.probe_spec import MAX_READINGS


@dataclass(eq=False, repr=False, kw_only=True)
class MlpClassifier(TorchClassifier):
    """One hidden layer: logits = A relu(W x + b) + c, with a logit for the positive of two classes, or one for each of more.

    X: [n d]. See `TorchClassifier` for the other parameters and for what is learnt.
    """

    n_hidden: int = 64

    def decision_function(self, X: Any) -> Array:
        """Logits: [n] for two classes, [n n_classes] otherwise; in float64."""
        sequences, head = self._examples(X), self.head_
        readings = readings_of(head, sequences, 0, len(sequences))
        logits = _readout(head.readout, head.readout_intercept).token_logits(readings).numpy()
        return logits[:, 0] if len(self.classes_) == 2 else logits

    def _own_limits(self) -> None:
        check_whole("n_hidden", self.n_hidden, most=MAX_READINGS)

    def _train(self, data: TrainingSet, schedule: Schedule) -> tuple[FittedHead, tuple[Epoch, ...]]:
        d, n_outputs = data.sequences.values.shape[1], data.n_outputs

        def start(*shape: int, deviation: float) -> Tensor:
            values = torch.randn(*shape, generator=data.generator, dtype=torch.float32) * deviation
            return values.to(data.device).requires_grad_()

        weight, hidden_bias = start(self.n_hidden, d, deviation=1 / math.sqrt(d)), start(self.n_hidden, deviation=0.0)
        readout, bias = (
            start(n_outputs, self.n_hidden, deviation=0.1 / math.sqrt(self.n_hidden)),
            start(n_outputs, deviation=0.0),
        )

        def losses(batch: Batch) -> Tensor:
            hidden = (data.scaling.readings(batch.tokens, weight) + hidden_bias).relu()
            logits = torch.nn.functional.linear(hidden, readout, bias)
            if n_outputs == 1:
                return binary_cross_entropy_with_logits(logits[:, 0], batch.targets, reduction="none")
            return cross_entropy(logits, batch.targets, reduction="none")

        history = minimise([weight, hidden_bias, readout, bias], losses, data, schedule)
        direction, intercept = data.scaling.folded(weight)
        head = FittedHead(
            kind="mlp",
            direction=direction,
            intercept=intercept + _float64(hidden_bias),
            readout=_float64(readout),
            readout_intercept=_float64(bias),
            n_hidden=self.n_hidden,
        )
        return head, history


@dataclass(eq=False, repr=False, kw_only=True)
class PolynomialClassifier(TorchClassifier):
    """The logit b + w . x + sum_k sum_r c_kr (u_kr . x)^k, k from 2 to degree, r over rank (Oldfield et al. 2025,
    arXiv:2509.26238), for two classes.

    Trained order by order, the lower ones frozen: order 1 is logistic regression, and the polynomial cut after any order is
    a probe of its own, for a cascade that goes on only where a lower order is unsure. An order that lowers the validation
    loss in no epoch stays 0. x is standardised in training, so that u_kr . x stands for a deviation from the mean.

    X: [n d]. See `TorchClassifier` for the other parameters and for what is learnt: history_ holds all orders, n_epochs_
    counts them all, best_epoch_ and validation_loss_ are those of the last.
    """

    degree: int = 3
    rank: int = 8

    def decision_function(self, X: Any, degree: int | None = None) -> Array:
        """Logits [n], in float64; of the polynomial cut after order `degree`, if given."""
        sequences, head = self._examples(X), self.head_
        orders = polynomial_orders(self.degree, self.rank)
        if degree is not None:
            check_whole("degree", degree)
            if degree > self.degree:
                raise InputError(f"degree is {degree}, but this polynomial was trained up to degree {self.degree}.")
            orders = polynomial_orders(degree, self.rank)
        readings = readings_of(head, sequences, 0, len(sequences))[:, : len(orders)]
        readout = _readout(np.asarray(head.readout)[:, : len(orders)], head.readout_intercept, orders)
        return readout.token_logits(readings)[:, 0].numpy()

    def _own_limits(self) -> None:
        check_whole("degree", self.degree, most=MAX_READINGS)
        check_whole("rank", self.rank, most=(MAX_READINGS - 1) // max(1, self.degree - 1))

    def _train(self, data: TrainingSet, schedule: Schedule) -> tuple[FittedHead, tuple[Epoch, ...]]:
        d, device = data.sequences.values.shape[1], data.device
        weights = [torch.zeros(1, d, dtype=torch.float32, device=device)]
        readouts = [torch.ones(1, 1, dtype=torch.float32, device=device)]
        bias = torch.zeros(1, dtype=torch.float32, device=device)
        history: list[Epoch] = []
        for order in range(1, self.degree + 1):
            if order > 1:
                # terms that differ, and weigh nothing yet: training starts from the lower orders as they are
                spread = torch.randn(self.rank, d, generator=data.generator, dtype=torch.float32) / math.sqrt(d)
                weights.append(spread.to(device))
                readouts.append(torch.zeros(1, self.rank, dtype=torch.float32, device=device))
            trained = [weights[-1], bias if order == 1 else readouts[-1]]
            for parameter in trained:
                parameter.requires_grad_()

            def losses(batch: Batch) -> Tensor:
                logits = bias
                for power, (weight, readout) in enumerate(zip(weights, readouts, strict=True), start=1):
                    terms = data.scaling.readings(batch.tokens, weight).pow(power)
                    logits = logits + torch.nn.functional.linear(terms, readout)[:, 0]
                return binary_cross_entropy_with_logits(logits, batch.targets, reduction="none")

            history += minimise(trained, losses, data, schedule, stage=order)
            for parameter in trained:
                parameter.requires_grad_(False)
        direction, intercept = data.scaling.folded(torch.cat(weights))
        head = FittedHead(
            kind="polynomial",
            direction=direction,
            intercept=intercept,
            readout=_float64(torch.cat(readouts, dim=1)),
            readout_intercept=_float64(bias),
            degree=self.degree,
            rank=self.rank,
        )
        return head, tuple(history)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


def _readout(readout: Any, intercept: Any, orders: Tensor | None = None) -> ReadoutHead:
    weight = torch.from_numpy(np.ascontiguousarray(readout))
    return ReadoutHead(len(weight), weight, torch.from_numpy(intercept), orders)


def _float64(parameter: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return parameter.detach().cpu().double().numpy()


VECTOR_CLASSIFIERS: dict[str, Callable[[int | None], BaseEstimator]] = {
    "mlp": lambda random_state: MlpClassifier(random_state=random_state),
    "polynomial": lambda random_state: PolynomialClassifier(random_state=random_state),
}
