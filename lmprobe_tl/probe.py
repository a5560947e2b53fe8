"""The estimator: prompts and labels in, a probe on the residual stream out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.validation import check_is_fitted

from lmprobe_tl.activation_store import ActivationStore
from lmprobe_tl.artefact import artefact_of, pooling_name
from lmprobe_tl.calibration import Calibration
from lmprobe_tl.errors import InputError, PoolingMismatchWarning
from lmprobe_tl.estimators import make_classifier, own_pooling
from lmprobe_tl.estimators.contrast import check_contrast
from lmprobe_tl.estimators.pairs import last_step
from lmprobe_tl.evaluation import Evaluation, evaluate_scores
from lmprobe_tl.hook_points import HookPoints
from lmprobe_tl.inference import TokenOutputs
from lmprobe_tl.labels import check_classes
from lmprobe_tl.learnt import Learnt, learnt_from_examples, learnt_from_store, training_record
from lmprobe_tl.live.calibration import CalibrationGoal, calibration_tokens, measure_calibration, score_settings
from lmprobe_tl.pooling import PoolingStrategy
from lmprobe_tl.probe_outputs import Outputs, judged_by, outputs_of
from lmprobe_tl.probe_poolings import probe_poolings
from lmprobe_tl.probe_report import ProbeReport
from lmprobe_tl.probe_settings import batch_settings
from lmprobe_tl.provenance import classifier_name
from lmprobe_tl.scored import Scored
from lmprobe_tl.tokens import Prompt, Truncation, check_prompts
from lmprobe_tl.training_examples import TrainingExamples, training_examples
from lmprobe_tl.weights import ProbeWeights


class Probe(ClassifierMixin, BaseEstimator):
    """A classifier on pooled activations of a language model, with scikit-learn's estimator contract.

    model: a TransformerLens `TransformerBridge`, a model with the same hook surface, or a name or folder to load. It is
    shared by clones, never copied.
    hook_points: a layer, a hook name, a list of these (concatenated), or 'all'.
    pooling: for training and inference, 'last_token' where nothing is given; `train_pooling` and `inference_pooling` win
        over it. Training takes 'last_token', 'mean', 'first_token', 'eos', 'all' (each token an example) or a callable;
        inference takes these, 'max' and 'min' of scores, every form with a 'score:' or 'activation:' prefix, and the
        streaming reductions, as 'score:ema_max(0.5)'.
    classifier: of pooled activations 'logistic_regression', 'ridge', 'lda', 'mass_mean', 'mass_mean_whitened', 'mlp',
        'polynomial', 'stacking' (a classifier a hook point, and one on their logits), 'pca' and 'ccs' (on pairs: the i-th
        prompt of each class), or any scikit-learn classifier, of which only one with a linear rule can be saved. Of token
        sequences, which they reduce themselves, so that pooling stays None: 'attention', 'multimax', 'rolling_attention',
        and with a linear direction 'softmax' and 'windowed', which take another reduction as `inference_pooling`; or an
        instance.
    include_bos: let a leading BOS count where it does not ('mean', 'max', 'min', 'all', callables).
    equal_prompt_weight: with train_pooling 'all', let every prompt weigh the same, not every token.
    prepend_bos, max_length, truncation: how prompts become tokens; see `tokenize_prompts`.
    max_tokens_per_batch, batch_size: of one forward pass; see `extract_activations`.
    name: key of the probe's scores when it runs live.

    Learnt: `classes_` (with two, the second is positive), `classifier_`, `hook_names_`, `n_features_in_`, `weights_`, and
    with train_pooling 'all' `groups_`, the prompt of each training example; after `calibrate` `calibration_`.

    On models with LayerNorm the mean over d_model is taken off each activation, so that the direction sums to zero and
    scores are the same whether the model's weights were centred or not.

    >>> probe = Probe(model, hook_points=6).fit(prompts, labels)  # doctest: +SKIP
    >>> probe.predict_proba(["Is this a test?"])  # doctest: +SKIP
    array([[0.08, 0.92]])
    """

    def __init__(
        self,
        model: Any,
        hook_points: HookPoints = "all",
        pooling: str | PoolingStrategy | None = None,
        *,
        train_pooling: str | PoolingStrategy | None = None,
        inference_pooling: str | PoolingStrategy | None = None,
        classifier: Any = "logistic_regression",
        include_bos: bool = False,
        equal_prompt_weight: bool = False,
        prepend_bos: bool | None = None,
        max_length: int | None = None,
        truncation: Truncation = None,
        max_tokens_per_batch: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        random_state: int | None = None,
        name: str = "probe",
    ) -> None:
        self.model = model
        self.hook_points = hook_points
        self.pooling = pooling
        self.train_pooling = train_pooling
        self.inference_pooling = inference_pooling
        self.classifier = classifier
        self.include_bos = include_bos
        self.equal_prompt_weight = equal_prompt_weight
        self.prepend_bos = prepend_bos
        self.max_length = max_length
        self.truncation = truncation
        self.max_tokens_per_batch = max_tokens_per_batch
        self.batch_size = batch_size
        self.progress = progress
        self.random_state = random_state
        self.name = name
        train, inference = self.poolings()
        if train != inference and own_pooling(classifier) is None:
            warnings.warn(
                f"trained with pooling {pooling_name(train)!r}, used with {pooling_name(inference)!r}: "
                "the classifier will see "
                "activations of another kind than it learnt from. Evaluate and set thresholds under the inference pooling.",
                PoolingMismatchWarning,
                stacklevel=2,
            )

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        """The parameters that tell probes apart; a model's own repr has hundreds of lines."""
        try:
            sides = self.poolings()
        except InputError:  # of parameters that were set since
            sides = (self.train_pooling or self.pooling or "?", self.inference_pooling or self.pooling or "?")
        pooling = " -> ".join(dict.fromkeys(map(pooling_name, sides)))
        state = f"fitted on {self.training_.n_examples} examples" if hasattr(self, "training_") else "not fitted"
        classifier = classifier_name(self.classifier)
        return (
            f"Probe({self.name!r}, hook_points={self.hook_points!r}, pooling={pooling!r}, classifier={classifier}; {state})"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": repr(self)}

    def __sklearn_clone__(self) -> Probe:
        """An unfitted copy with the same parameters, which shares the model."""
        parameters = self.get_params(deep=False)
        parameters["classifier"] = clone(self.classifier, safe=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PoolingMismatchWarning)  # the original warned already
            return type(self)(**parameters)

    def poolings(self) -> tuple[str | PoolingStrategy, str | PoolingStrategy]:
        """The pooling for training and the one for inference; 'sequence' where a classifier reduces the tokens itself."""
        return probe_poolings(self.classifier, self.pooling, self.train_pooling, self.inference_pooling)

    # --- training ---

    def fit(self, prompts: Sequence[Prompt], labels: Any) -> Probe:
        """Extract, pool and fit. labels: one int, bool or str a prompt; with train_pooling 'all' also one sequence a prompt
        with a label for each token that counts.

        Raises InputError for prompts or labels that cannot be used, before the model runs.
        """
        return self.fit_examples(self.training_examples(prompts, labels))

    def training_examples(self, prompts: Sequence[Prompt], labels: Any) -> TrainingExamples:
        """What `fit` learns from: features and labels of each prompt, or with train_pooling 'all' of each token."""
        return training_examples(self, prompts, labels)

    def fit_examples(self, examples: TrainingExamples) -> Probe:
        """Fit on what `training_examples` of a probe with the same parameters gave."""
        return self._learn(learnt_from_examples(self, examples))

    def fit_store(self, store: ActivationStore | str | Path, labels: Any) -> Probe:
        """Fit on the activations of a store, which may be bigger than memory. labels: as in `fit`.

        The named classifiers are fitted in passes over the store, one block of it in memory at a time, and learn what `fit`
        learns on the same prompts; any other classifier gets all examples at once. train_pooling and hook_points say what is
        read from the store.
        Raises StoreError for a store of another model or made with other settings, InputError for a hook point or a pooling
        that it does not have, and for labels that cannot be used.
        """
        return self._learn(learnt_from_store(self, store, labels))

    def fit_contrast(self, positive: Sequence[Prompt], negative: Sequence[Prompt], *, truth: Any = None) -> Probe:
        """Fit on two lists of prompts; the classes are 0 (negative) and 1 (positive).

        For 'pca' and 'ccs' the i-th prompts of both lists make a pair, so that they must be equally long. truth, for 'ccs'
        alone: [n_pairs], whether the positive is the true one, which decides that class 1 means true; without it 'ccs' may
        mean either.
        """
        positive, negative = check_prompts(positive), check_prompts(negative)
        check_contrast(make_classifier(self.classifier, self.random_state), len(positive), len(negative), truth)
        self.fit([*negative, *positive], [0] * len(negative) + [1] * len(positive))
        if truth is not None:
            last_step(self.classifier_).orient(truth)
        return self

    def _learn(self, learnt: Learnt) -> Probe:
        """Become a probe that has learnt this."""
        self.classifier_, self.model_, self.hook_names_ = learnt.classifier, learnt.model, learnt.hook_names
        self.classes_ = check_classes(learnt.labels)
        self._trained_on, self._sample = frozenset(learnt.digests), learnt.sample
        self.n_features_in_ = learnt.sample.shape[1]
        for stale in ("calibration_", "_calibrated_as", "groups_"):  # of a fit before
            self.__dict__.pop(stale, None)
        if learnt.groups is not None:
            self.groups_ = learnt.groups
        self.training_ = training_record(self, learnt)
        return self

    # --- inference ---

    def _outputs(self, prompts: Sequence[Prompt], inference: str | PoolingStrategy | None = None) -> Outputs:
        """(logits, probabilities) of each prompt, or of each token with inference pooling 'all'; None takes the probe's
        own."""
        check_is_fitted(self, "classifier_")
        return outputs_of(self, [self.classifier_], prompts, inference)[0]

    def predict_proba(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """[n_prompts n_classes]; with inference pooling 'all' [n_prompts pos] of the positive class ([n_prompts pos
        n_classes] with several), where column i is token i of the prompt (BOS not among them unless include_bos) and NaN
        where there is none."""
        outputs = self._outputs(prompts)
        return outputs.padded(outputs.probabilities) if isinstance(outputs, TokenOutputs) else outputs[1]

    def decision_function(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Logits: [n_prompts] for two classes, [n_prompts n_classes] else; [n_prompts pos ...] with inference pooling
        'all'."""
        outputs = self._outputs(prompts)
        return outputs.padded(outputs.logits) if isinstance(outputs, TokenOutputs) else outputs[0]

    def predict(self, prompts: Sequence[Prompt]) -> Any:
        """The most probable class of each prompt; with inference pooling 'all' a list of one array of classes a prompt."""
        outputs = self._outputs(prompts)
        if isinstance(outputs, TokenOutputs):
            return outputs.by_prompt(self.classes_[outputs.winners()])
        return self.classes_[outputs[1].argmax(axis=1)]

    def score(self, prompts: Sequence[Prompt], labels: Any, sample_weight: Any = None) -> float:
        """Accuracy on prompts, or on tokens with inference pooling 'all'. sample_weight: one weight a prompt."""
        judged = self.judged(prompts, labels)
        weight = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)[judged.prompts]
        return float(np.average(judged.predicted == judged.labels, weights=weight))

    def evaluate(
        self,
        prompts: Sequence[Prompt],
        labels: Any,
        *,
        fpr: float = 0.01,
        n_bootstrap: int = 1000,
        confidence: float = 0.95,
        random_state: int | None = 0,
    ) -> Evaluation:
        """AUROC, accuracy and TPR at an FPR with bootstrap intervals over prompts, as a frozen record.

        labels: one a prompt; or one sequence a prompt, which judges each token's own score whatever the inference pooling.
        """
        judged = self.judged(prompts, labels)
        return evaluate_scores(
            self.classes_[judged.labels],
            judged.scores,
            self.classes_[judged.predicted],
            judged.prompts,
            level=judged.level,
            pooling="all" if judged.level == "token" else pooling_name(self.poolings()[1]),
            fpr=fpr,
            n_bootstrap=n_bootstrap,
            confidence=confidence,
            random_state=random_state,
        )

    def judged(self, prompts: Sequence[Prompt], labels: Any) -> Scored:
        """Labels and scores of each prompt or, with token labels or inference pooling 'all', of each token."""
        check_is_fitted(self, "classifier_")
        return self.judged_with([self.classifier_], prompts, labels)[0]

    def judged_with(self, classifiers: Sequence[Any], prompts: Sequence[Prompt], labels: Any) -> list[Scored]:
        """What `judged` gives with each of several fitted classifiers of the same classes in the place of the probe's own;
        the model runs once."""
        check_is_fitted(self, "classifier_")
        return judged_by(self, classifiers, prompts, labels)

    # --- thresholds ---

    def calibrate(
        self,
        negative_prompts: Sequence[Prompt],
        fpr: float = 0.01,
        delta: float = 0.05,
        *,
        method: str = "pac",
        positive_prompts: Sequence[Prompt] | None = None,
        min_recall: float | None = None,
        probability: bool = False,
    ) -> Probe:
        """Set the threshold for live use on whole negative sequences; see `calibrate_probe` for all arguments.

        Learnt: `calibration_`, which `weights_` and `save` carry from then on; `fit` drops it.
        Raises what `calibrate_probe` raises, and CalibrationError for prompts that the probe was trained on, except with
        method 'empirical': on these its scores say nothing of new text.
        """
        weights, goal = artefact_of(self), CalibrationGoal(fpr, delta, method, min_recall, probability)
        goal.check(weights, negative_prompts, positive_prompts)
        tokens = calibration_tokens(self, goal, negative_prompts, positive_prompts)
        self.calibration_: Calibration = measure_calibration(self.model_, weights, goal, *tokens, **batch_settings(self))
        self._calibrated_as: dict[str, Any] = score_settings(weights)
        return self

    # --- the artefact ---

    @property
    def weights_(self) -> ProbeWeights:
        """The frozen artefact to save, share and attach. NonlinearClassifierError for a classifier that is of no kind of
        probe, and whose decisions no linear rule gives."""
        return self.to_weights()

    def to_weights(self) -> ProbeWeights:
        """See `weights_`. InputError where parameters that change the scores were set after `calibrate`."""
        weights = artefact_of(self)
        if not hasattr(self, "calibration_"):
            return weights
        if score_settings(weights) != self._calibrated_as:
            raise InputError(
                f"the threshold was calibrated with {self._calibrated_as}, and the parameters now say "
                f"{score_settings(weights)}; call calibrate (or fit) again."
            )
        return weights.with_calibration(self.calibration_)

    def save(self, path: str | Path, *, evaluation: Evaluation | ProbeReport | None = None) -> Path:
        """Write the probe file, with the metrics of an evaluation if one is given; equal to `weights_.save(path)`."""
        if evaluation is not None and not isinstance(evaluation, (Evaluation, ProbeReport)):
            raise InputError(
                f"evaluation is a {type(evaluation).__name__}; expected what `evaluate` or `evaluate_probe` returned, "
                "or None."
            )
        weights = self.to_weights()
        if evaluation is not None:
            weights = weights.with_metrics({**weights.spec.metrics, **evaluation.records()})
        return weights.save(path)
