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
from lmprobe_tl.estimators.contrast import check_contrast, check_paired
from lmprobe_tl.estimators.fitting import fit_classifier
from lmprobe_tl.estimators.layer_stack import with_n_blocks
from lmprobe_tl.estimators.pairs import last_step
from lmprobe_tl.estimators.streaming import can_stream, fit_blocks, fit_features
from lmprobe_tl.estimators.token_sequences import TokenSequences
from lmprobe_tl.evaluation import Evaluation, evaluate_scores
from lmprobe_tl.extraction import extract_rows
from lmprobe_tl.features import TrainingExamples, are_constant, constant_error, evenly_spread
from lmprobe_tl.hook_points import (
    HookPoints,
    load_model,
    normalization,
    resolve_hook_points,
)
from lmprobe_tl.inference import TokenOutputs, prompt_outputs, token_outputs
from lmprobe_tl.labels import are_token_labels, check_classes, check_labels, check_token_labels
from lmprobe_tl.live.calibration import CalibrationGoal, check_unseen, measure_calibration, score_settings
from lmprobe_tl.pooling import PoolingStrategy, parse_pooling_strategy
from lmprobe_tl.probe_poolings import probe_poolings
from lmprobe_tl.probe_report import ProbeReport
from lmprobe_tl.probe_spec import TrainingRecord
from lmprobe_tl.provenance import classifier_name, data_hash
from lmprobe_tl.scored import Scored
from lmprobe_tl.store_examples import StoreExamples, check_store_is_of
from lmprobe_tl.tokens import (
    Prompt,
    Truncation,
    bos_id,
    check_prompts,
    check_rows_count,
    counted_lengths,
    row_digest,
    tokenize_prompts,
)
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
        train, _ = self.poolings()
        prompts = check_prompts(prompts)
        per_token = are_token_labels(labels)
        if per_token and train != "all":
            raise InputError(
                f"labels has one sequence a prompt, but train_pooling is {pooling_name(train)!r}; token labels need 'all'."
            )
        if not per_token:
            labels = check_labels(labels, len(prompts))
            check_classes(labels)
        reads_sequences = own_pooling(self.classifier) is not None
        model = load_model(self.model)
        names = resolve_hook_points(model, self.hook_points)
        classifier = with_n_blocks(make_classifier(self.classifier, self.random_state), len(names))
        check_paired(classifier, labels, per_token=train == "all")
        rows = self._tokenize(model, prompts)
        lengths = counted_lengths(rows, bos_id(model), self.include_bos)
        digests = [row_digest(row) for row in rows]
        if reads_sequences:
            check_rows_count(lengths)
            tokens = self._extract(model, rows, names, "all")
            features, offsets = tokens.concatenated().numpy(), tokens.offsets.numpy()
            return TrainingExamples(model, names, features, labels, None, None, digests, offsets)
        if train == "all":
            check_rows_count(lengths)
            groups = np.repeat(np.arange(len(rows)), lengths)
            y = np.concatenate(check_token_labels(labels, lengths)) if per_token else labels[groups]
        else:
            groups, y = None, labels
        check_classes(y)
        activations = self._extract(model, rows, names, train)
        features = activations.concatenated().numpy().astype(np.float64)
        if are_constant(features):
            raise constant_error(train)
        weight = None
        if groups is not None and self.equal_prompt_weight:
            weight = 1 / np.asarray(lengths, dtype=np.float64)[groups]
            weight *= len(weight) / weight.sum()  # as strong together as unweighted tokens: C keeps its meaning
        return TrainingExamples(model, names, features, y, groups, weight, digests)

    def fit_examples(self, examples: TrainingExamples) -> Probe:
        """Fit on what `training_examples` of a probe with the same parameters gave."""
        names, digests = examples.hook_names, examples.digests
        classifier = with_n_blocks(make_classifier(self.classifier, self.random_state), len(names))
        features, y, groups = examples.features, examples.labels, examples.groups
        if examples.offsets is not None:
            sequences = TokenSequences(features, examples.offsets)
            return self._learn_sequences(examples.model, names, classifier, sequences, y, digests)
        fitted = fit_features(self.classifier, classifier, features, y, groups=groups, sample_weight=examples.weight)
        sample = features[evenly_spread(len(features))]
        return self._learn(examples.model, names, fitted, y, groups, digests, sample)

    def fit_store(self, store: ActivationStore | str | Path, labels: Any) -> Probe:
        """Fit on the activations of a store, which may be bigger than memory. labels: as in `fit`.

        The named classifiers are fitted in passes over the store, one block of it in memory at a time, and learn what `fit`
        learns on the same prompts; any other classifier gets all examples at once. train_pooling and hook_points say what is
        read from the store.
        Raises StoreError for a store of another model or made with other settings, InputError for a hook point or a pooling
        that it does not have, and for labels that cannot be used.
        """
        store = store if isinstance(store, ActivationStore) else ActivationStore(store)
        train, _ = self.poolings()
        if callable(train):
            raise InputError(f"pooling {pooling_name(train)!r} is a function, and a store holds named poolings alone.")
        model = load_model(self.model)
        names = resolve_hook_points(model, self.hook_points)
        # These raise before the model's weights are read.
        reads_sequences = own_pooling(self.classifier) is not None
        pooling = "all" if reads_sequences else train
        store.hook_names(names)
        store.check_pooling(pooling)
        store.check_complete()
        check_store_is_of(
            store,
            model,
            prepend_bos=self.prepend_bos,
            include_bos=self.include_bos,
            max_length=self.max_length,
            truncation=self.truncation,
        )
        classifier = with_n_blocks(make_classifier(self.classifier, self.random_state), len(names))
        if reads_sequences and are_token_labels(labels):
            raise InputError(
                f"labels has one sequence a prompt; {classifier_name(self.classifier)} takes one label a prompt."
            )
        examples = StoreExamples(
            store,
            names,
            pooling,
            labels,
            centre=normalization(model) == "layernorm",
            equal_prompt_weight=self.equal_prompt_weight,
        )
        check_paired(classifier, examples.labels, per_token=train == "all")
        digests = [bytes(row) for row in store.digests()]
        if reads_sequences:
            sequences = TokenSequences(examples.in_memory(np.float32)[0], np.concatenate([[0], np.cumsum(store.lengths())]))
            of_prompts = examples.labels[sequences.offsets[:-1]]
            return self._learn_sequences(model, names, classifier, sequences, of_prompts, digests)
        if can_stream(self.classifier):
            fitted = fit_blocks(self.classifier, classifier, examples.blocks, examples.classes)
        else:
            features, weight = examples.in_memory()
            fitted = fit_classifier(classifier, features, examples.labels, groups=examples.groups, sample_weight=weight)
        return self._learn(model, names, fitted, examples.labels, examples.groups, digests, examples.sample())

    def _learn_sequences(
        self,
        model: Any,
        names: Sequence[str],
        classifier: Any,
        sequences: TokenSequences,
        labels: np.ndarray,
        digests: list[bytes],
    ) -> Probe:
        """Fit a sequence classifier; equal prompts are never both learnt from and held out for early stopping."""
        sample = np.asarray(sequences.values[evenly_spread(len(sequences.values))], dtype=np.float64)
        if are_constant(sample):
            raise constant_error("all")
        classifier.fit(sequences, labels, groups=np.unique(digests, return_inverse=True)[1])
        return self._learn(model, names, classifier, labels, None, digests, sample)

    def _learn(
        self,
        model: Any,
        names: Sequence[str],
        classifier: Any,
        y: np.ndarray,
        groups: np.ndarray | None,
        digests: list[bytes],
        sample: np.ndarray,
    ) -> Probe:
        """Set what is learnt. y, groups: label and prompt of each example; digests: of each prompt's token ids; sample: some
        of the features, to prove on them that a linear rule says what the classifier says."""
        self.classifier_, self.model_, self.hook_names_, self.classes_ = classifier, model, names, check_classes(y)
        if hasattr(self, "calibration_"):
            del self.calibration_, self._calibrated_as  # of the classifier before
        self._trained_on, self._sample = frozenset(digests), sample
        self.n_features_in_ = sample.shape[1]
        if groups is not None:
            self.groups_ = groups
        elif hasattr(self, "groups_"):
            del self.groups_  # of a fit on tokens before
        self.training_ = TrainingRecord(
            data_sha256=data_hash(digests, y),
            n_prompts=len(digests),
            n_examples=len(y),
            class_counts=tuple(int((y == one).sum()) for one in self.classes_),
            classifier=classifier_name(self.classifier),
            random_state=self.random_state,
        )
        return self

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

    def _tokenize(self, model: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
        return tokenize_prompts(
            model, prompts, prepend_bos=self.prepend_bos, max_length=self.max_length, truncation=self.truncation
        )

    def _extract(self, model: Any, rows: list[list[int]], names: Sequence[str], pooling: str | PoolingStrategy) -> Any:
        strategy = (
            pooling
            if callable(pooling) or pooling == "all"
            else f"activation:{parse_pooling_strategy(pooling).base_strategy}"
        )
        return extract_rows(
            model,
            rows,
            names,
            strategy,
            max_tokens_per_batch=self.max_tokens_per_batch,
            batch_size=self.batch_size,
            include_bos=self.include_bos,
            centre=normalization(model) == "layernorm",
            progress=self.progress,
        )

    # --- inference ---

    def _outputs(
        self, prompts: Sequence[Prompt], inference: str | PoolingStrategy | None = None
    ) -> TokenOutputs | tuple[np.ndarray, np.ndarray]:
        """(logits, probabilities) of each prompt, or of each token with inference pooling 'all'; None takes the probe's
        own."""
        check_is_fitted(self, "classifier_")
        return self._outputs_of([self.classifier_], prompts, inference)[0]

    def _outputs_of(
        self, classifiers: Sequence[Any], prompts: Sequence[Prompt], inference: str | PoolingStrategy | None
    ) -> Sequence[TokenOutputs | tuple[np.ndarray, np.ndarray]]:
        """What `_outputs` gives with each of several classifiers in the place of the probe's own."""
        rows = self._tokenize(self.model_, check_prompts(prompts))
        inference = inference or self.poolings()[1]
        settings: dict[str, Any] = {
            "max_tokens_per_batch": self.max_tokens_per_batch,
            "batch_size": self.batch_size,
            "include_bos": self.include_bos,
            "centre": normalization(self.model_) == "layernorm",
            "progress": self.progress,
        }
        if inference == "all":
            return token_outputs(self.model_, rows, self.hook_names_, classifiers, **settings)
        return prompt_outputs(self.model_, rows, self.hook_names_, classifiers, inference, **settings)

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
        prompts = check_prompts(prompts)
        token_labels = are_token_labels(labels)
        if not token_labels:
            labels = check_labels(labels, len(prompts))
        classes, found = self.classes_.tolist(), []
        for outputs in self._outputs_of(classifiers, prompts, "all" if token_labels else None):
            if isinstance(outputs, TokenOutputs):
                owners = np.repeat(np.arange(len(prompts)), outputs.lengths)
                truth = np.concatenate(check_token_labels(labels, outputs.lengths)) if token_labels else labels[owners]
                one = Scored.of(truth, outputs.logits, outputs.probabilities, owners, classes, "token")
            else:
                one = Scored.of(labels, *outputs, np.arange(len(prompts)), classes, "prompt")
            found.append(one)
        return found

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
        weights, goal = self._weights(), CalibrationGoal(fpr, delta, method, min_recall, probability)
        goal.check(weights, negative_prompts, positive_prompts)
        tokens: list[Any] = [None, None]
        for at, (name, prompts) in enumerate(
            (("negative_prompts", negative_prompts), ("positive_prompts", positive_prompts))
        ):
            if prompts is not None:
                rows = self._tokenize(self.model_, check_prompts(prompts))
                if method != "empirical":
                    check_unseen(rows, self._trained_on, name)
                tokens[at] = [np.array(row, dtype=np.int64) for row in rows]
        self.calibration_: Calibration = measure_calibration(
            self.model_,
            weights,
            goal,
            *tokens,
            max_tokens_per_batch=self.max_tokens_per_batch,
            batch_size=self.batch_size,
            progress=self.progress,
        )
        self._calibrated_as: dict[str, Any] = score_settings(weights)
        return self

    # --- the artefact ---

    @property
    def weights_(self) -> ProbeWeights:
        """The frozen artefact to save, share and attach. NonlinearClassifierError where no linear rule says what the
        classifier says."""
        return self.to_weights()

    def to_weights(self) -> ProbeWeights:
        """See `weights_`. InputError where parameters that change the scores were set after `calibrate`."""
        weights = self._weights()
        if not hasattr(self, "calibration_"):
            return weights
        if score_settings(weights) != self._calibrated_as:
            raise InputError(
                f"the threshold was calibrated with {self._calibrated_as}, and the parameters now say "
                f"{score_settings(weights)}; call calibrate (or fit) again."
            )
        return weights.with_calibration(self.calibration_)

    def _weights(self) -> ProbeWeights:
        """The artefact without what `calibrate` learnt."""
        return artefact_of(self)

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
