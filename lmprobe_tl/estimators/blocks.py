"""Examples that come in blocks, pass after pass, and the moments of their classes, added up block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.errors import InputError

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Block:
    """Some of the examples: `features` [n n_features], `classes` [n] as indices, `weight` [n] or None for ones.

    A block may be empty, and it may lack a class. Features may be float32 or float16: sums are taken in float64.
    """

    features: NDArray[Any]
    classes: NDArray[Any]
    weight: Array | None = None


Blocks: TypeAlias = Callable[[], Iterable[Block]]  # each call is a pass over all examples, in the same order


class Passes:
    """Blocks to go through again and again, without the empty ones.

    The first pass checks each block, and learns n_examples, n_features and class_weight [n_classes]. Every later pass must
    give as many examples. classes: those that the indices stand for.

    Raises InputError, while a pass runs, for a block of another width, for features that are not finite, for a class index
    or weight out of range; at the end of the first pass for a class without weight, and of a later one for another count.
    """

    def __init__(self, blocks: Blocks, classes: NDArray[Any]) -> None:
        if len(classes) < 2:
            raise InputError(f"A classifier needs at least two classes, got {classes.tolist()}.")
        self._blocks, self._classes, self._is_checked = blocks, classes, False
        self.n_examples, self.n_features = 0, 0
        self.class_weight = np.zeros(len(classes))

    def __call__(self) -> Iterator[Block]:
        count = 0
        for number, block in enumerate(self._blocks()):
            if not len(block.features):
                continue
            if not self._is_checked:
                self._check(block, f"block {number}")
            count += len(block.classes)
            yield block
        if not self._is_checked:
            self._check_classes()
            self.n_examples, self._is_checked = count, True
        elif count != self.n_examples:
            raise InputError(
                f"A pass over the blocks gave {count} examples, the first one {self.n_examples}. Each call of blocks() must "
                "give all examples anew; an iterator that is used up gives none."
            )

    def _check(self, block: Block, name: str) -> None:
        n_examples, n_features = block.features.shape if block.features.ndim == 2 else (0, 0)
        self.n_features = self.n_features or n_features
        if not n_examples or n_features != self.n_features:
            expected = f"[n_examples {self.n_features or 'n_features'}]"
            raise InputError(f"The features of {name} have shape {block.features.shape}, expected {expected}.")
        if not np.isfinite(block.features).all():
            raise InputError(f"The features of {name} hold NaN or infinite values; they must be finite.")
        classes, n_classes = block.classes, len(self._classes)
        if (
            classes.shape != (n_examples,)
            or classes.dtype.kind not in "iu"
            or not (0 <= classes.min() <= classes.max() < n_classes)
        ):
            raise InputError(
                f"The classes of {name} must be {n_examples} indices from 0 to {n_classes - 1}, got {classes.dtype} values "
                f"of shape {classes.shape} from {classes.min()} to {classes.max()}."
            )
        weight = block.weight
        if weight is not None and (weight.shape != (n_examples,) or not (np.isfinite(weight) & (weight >= 0)).all()):
            raise InputError(
                f"The weights of {name} must be {n_examples} finite numbers that are not negative, got values of shape "
                f"{weight.shape} from {weight.min()} to {weight.max()}."
            )
        self.class_weight += np.bincount(classes, weight, minlength=n_classes)

    def _check_classes(self) -> None:
        if not self.class_weight.all():
            absent = self._classes[self.class_weight == 0].tolist()
            raise InputError(f"No example of class {absent[0]!r} has weight, in any block. Leave it out of the classes.")


class Moments:
    """Counts, weights, means and scatter of each class, added up block by block.

    count, weight: [n_classes]; means: [n_classes n_features]; scatter: [n_classes n_features n_features], the sums of
    w (x - mean)(x - mean)', or with only_pooled their total [1 n_features n_features]. Two sets are joined as in Chan, Golub
    and LeVeque (1979), which keeps the digits that a difference of sums of squares would lose.
    """

    def __init__(self, n_classes: int, *, with_scatter: bool, only_pooled: bool = False) -> None:
        self.count, self.weight = np.zeros(n_classes, dtype=np.int64), np.zeros(n_classes)
        self.means: Array = np.zeros((n_classes, 0))
        self.scatter: Array = np.zeros((0, 0, 0))
        self._n_scatters = 0 if not with_scatter else 1 if only_pooled else n_classes

    def add(self, block: Block) -> None:
        """Join the examples of a block, in float64."""
        if not self.means.size:
            n_features = block.features.shape[1]
            self.means = np.zeros((len(self.weight), n_features))
            self.scatter = np.zeros((self._n_scatters, n_features, n_features))
        for index in np.unique(block.classes):
            member = block.classes == index
            weight = np.ones(member.sum()) if block.weight is None else block.weight[member]
            if weight.any():
                self._join(index, block.features[member], weight)

    def _join(self, index: int, features: NDArray[Any], weight: Array) -> None:
        total = weight.sum()
        mean = weight @ features / total
        before, after = self.weight[index], self.weight[index] + total
        step = mean - self.means[index]
        if self._n_scatters:
            residuals = (features - mean) * np.sqrt(weight)[:, None]
            scatter = self.scatter[index if self._n_scatters > 1 else 0]
            scatter += residuals.T @ residuals
            scatter += np.outer(step, step) * (before * total / after)
        self.means[index] += step * (total / after)
        self.weight[index] = after
        self.count[index] += len(weight)


def standard_deviation(variance: Array, mean: Array, count: int) -> Array:
    """Roots of the variances [n_features]; exactly 0 for a feature that is constant up to rounding.

    The bound is that of scikit-learn's StandardScaler: the mean of `count` equal numbers may differ from each of them, and
    what then looks like variance is noise.
    """
    eps = np.finfo(np.float64).eps
    constant = variance <= count * eps * variance + (count * mean * eps) ** 2
    return np.where(constant, 0.0, np.sqrt(variance))
