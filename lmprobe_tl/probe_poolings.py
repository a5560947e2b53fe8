"""Which poolings a probe trains and scores with: those it is given, or those that its classifier brings along."""

from __future__ import annotations

from typing import Any, TypeAlias

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators import own_pooling
from lmprobe_tl.pooling import PoolingStrategy, parse_pooling_strategy, resolve_pooling
from lmprobe_tl.probe_spec import OWN_POOLING
from lmprobe_tl.provenance import classifier_name

Strategy: TypeAlias = str | PoolingStrategy


def probe_poolings(
    classifier: Any, pooling: Strategy | None, train_pooling: Strategy | None, inference_pooling: Strategy | None
) -> tuple[Strategy, Strategy]:
    """(training, inference) pooling of a probe with this classifier.

    pooling None: 'last_token', or what a sequence classifier does itself, 'sequence' or a reduction such as
    'score:softmax(5)'; where that is a reduction, another one may be given for inference.
    InputError for a pooling that cannot be used, as in `resolve_pooling`, or that the classifier leaves no room for.
    """
    own = own_pooling(classifier)
    if own is None:
        return resolve_pooling("last_token" if pooling is None else pooling, train_pooling, inference_pooling)
    name = classifier_name(classifier)
    given = {"pooling": pooling, "train_pooling": train_pooling}
    if own == OWN_POOLING:
        given["inference_pooling"] = inference_pooling
    for parameter, value in given.items():
        if value is not None:
            raise InputError(f"{parameter} is {value!r}; expected None, since {name} reduces the tokens of a prompt itself.")
    if inference_pooling is None:
        return own, own
    if callable(inference_pooling) or not parse_pooling_strategy(inference_pooling).is_score_pooling:
        raise InputError(
            f"inference_pooling is {inference_pooling!r}; expected None ({own!r}) or another reduction of token scores, "
            f"such as 'score:ema_max(0.1)', since {name} learns from whole token sequences."
        )
    return own, inference_pooling


def check_reads_as_fitted(probe: Any) -> None:
    """InputError where a fitted probe was given another classifier since, which reads other examples."""
    if own_pooling(probe.classifier) != own_pooling(probe.classifier_):
        raise InputError(
            f"the classifier is now {classifier_name(probe.classifier)}, which reads the tokens of a prompt in another way "
            f"than the fitted {type(probe.classifier_).__name__}; call fit again."
        )
