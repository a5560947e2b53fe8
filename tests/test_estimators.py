"""Named classifiers, the mass-mean probe, and the linear rule behind a fitted classifier."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from scipy.stats import norm
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.covariance import oas
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    Perceptron,
    RidgeClassifier,
    SGDClassifier,
)
from sklearn.model_selection import FixedThresholdClassifier, GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, Normalizer, RobustScaler, StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.utils.estimator_checks import estimator_checks_generator

from lmprobe_tl.errors import InputError, NonlinearClassifierError
from lmprobe_tl.estimators import (
    CLASSIFIERS,
    AttentionClassifier,
    MassMeanClassifier,
    MlpClassifier,
    WindowedClassifier,
    linear_rule,
    make_classifier,
)
from lmprobe_tl.estimators.streaming import can_stream
from lmprobe_tl.metrics import auroc


def gaussian_classes(n_classes=2, n_examples=240, n_features=12, seed=0):
    """features [n_examples n_features] with unequal scales and offsets, and labels [n_examples]; the classes overlap."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(99).normal(0, 0.7, (n_classes, n_features))
    labels = np.arange(n_examples) % n_classes
    scale = np.linspace(0.3, 3.0, n_features)
    return (means[labels] + rng.standard_normal((n_examples, n_features))) * scale + 2.0, labels


# --- Names and instances


@pytest.mark.parametrize("name", sorted(filter(can_stream, CLASSIFIERS)))
def test_every_linear_name_makes_a_classifier_that_learns_and_has_a_linear_rule(name):
    features, labels = gaussian_classes()
    classifier = make_classifier(name, random_state=0).fit(features, labels)
    fresh, fresh_labels = gaussian_classes(seed=1)
    assert auroc(fresh_labels, classifier.decision_function(fresh)) > 0.85
    np.testing.assert_allclose(linear_rule(classifier, features).logits(fresh)[:, 0], classifier.decision_function(fresh))
    assert make_classifier(name, random_state=0) is not make_classifier(name, random_state=0)


def test_the_default_converges_where_features_outnumber_examples():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    features = rng.standard_normal((60, 768)) * 5.0 + labels[:, None]
    classifier = make_classifier("logistic_regression", random_state=3).fit(features, labels)
    final = classifier[-1]
    assert final.n_iter_[0] < final.max_iter
    assert final.random_state == 3


def test_an_instance_is_cloned_and_stays_untouched():
    original = LinearSVC(C=0.5)
    classifier = make_classifier(original, random_state=0)
    classifier.fit(*gaussian_classes())
    assert classifier is not original
    assert classifier.C == 0.5
    assert not hasattr(original, "coef_")


@pytest.mark.parametrize(
    "wrapped",
    [
        GridSearchCV(AttentionClassifier(), {"n_heads": [1, 2]}),
        make_pipeline(StandardScaler(), WindowedClassifier()),
        OneVsRestClassifier(make_pipeline(StandardScaler(), AttentionClassifier())),
    ],
)
def test_a_sequence_classifier_inside_another_estimator_is_refused(wrapped):
    """Inside it would get pooled vectors, and learn from sequences of one token without a word."""
    with pytest.raises(InputError, match="learns from token sequences, but .* would give it pooled activations"):
        make_classifier(wrapped, random_state=0)
    make_classifier(GridSearchCV(MlpClassifier(), {"n_hidden": [1, 2]}), random_state=0)


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        ("logistic_regresion", r"'logistic_regresion'. Closest: 'logistic_regression'. All names: .*'mass_mean'"),
        ("massmean", r"Closest: 'mass_mean'"),
        (LogisticRegression, r"the class LogisticRegression. Pass LogisticRegression\(\)"),
        (LinearRegression(), r"must be a classifier, got LinearRegression\(\)"),
        (StandardScaler(), "has no predict"),
        (3, r"got 3, which has no fit and no predict"),
        (None, "got None"),
    ],
)
def test_what_is_no_classifier_is_refused(classifier, message):
    with pytest.raises(InputError, match=message):
        make_classifier(classifier, random_state=0)


# --- Mass-mean


def conformance_checks():
    """scikit-learn's own checks; that of array API input needs an environment variable before scikit-learn is imported."""
    for covariance in (False, True):
        for estimator, check in estimator_checks_generator(MassMeanClassifier(covariance=covariance)):
            if check.func.__name__ != "check_array_api_input":
                yield pytest.param(estimator, check, id=f"{check.func.__name__}, covariance={covariance}")


@pytest.mark.parametrize(("estimator", "check"), list(conformance_checks()))
def test_mass_mean_keeps_the_scikit_learn_contract(estimator, check):
    check(estimator)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def pooled_covariance(features, labels):
    residuals = np.concatenate([features[labels == label] - features[labels == label].mean(axis=0) for label in (0, 1)])
    return residuals.T @ residuals / len(residuals)


@pytest.mark.parametrize("covariance", [False, True])
def test_the_direction_is_that_of_plain_numpy(covariance):
    features, labels = correlated_classes()
    theta = features[labels == 1].mean(axis=0) - features[labels == 0].mean(axis=0)
    if covariance:
        deviation = np.sqrt(np.diag(pooled_covariance(features, labels)))
        residuals = np.concatenate([features[labels == k] - features[labels == k].mean(axis=0) for k in (0, 1)])
        shrunk, share = oas(residuals / deviation, assume_centered=True)
        assert 0.01 < share < 0.99
        theta = np.linalg.inv(shrunk) @ (theta / deviation) / deviation
    fitted = MassMeanClassifier(covariance=covariance).fit(features, labels)
    assert cosine(fitted.coef_[0], theta) == pytest.approx(1.0, abs=1e-10)
    other = np.random.default_rng(0).standard_normal(len(theta))
    assert abs(cosine(fitted.coef_[0], other)) < 0.9  # the control: not any direction passes


def correlated_classes(n_examples=240):
    features, labels = gaussian_classes(n_examples=n_examples)
    return features @ np.random.default_rng(7).standard_normal((12, 12)), labels


def test_the_whitened_direction_of_many_examples_is_that_of_lda():
    features, labels = correlated_classes(n_examples=100_000)
    lda = LinearDiscriminantAnalysis(solver="lsqr").fit(features, labels)
    whitened, plain = (MassMeanClassifier(covariance=flag).fit(features, labels).coef_[0] for flag in (True, False))
    assert cosine(whitened, lda.coef_[0]) == pytest.approx(1.0, abs=5e-3)
    assert cosine(plain, lda.coef_[0]) < 0.8


@pytest.mark.parametrize("spectrum", [0.0, 1.0])
@pytest.mark.parametrize(("n_features", "n_examples"), [(60, 100), (60, 40), (200, 200)])
def test_whitening_by_few_examples_is_no_worse_than_either_extreme(spectrum, n_features, n_examples):
    """White noise, where theta itself is best, and a power law, where theta is far from it; against a pseudo-inverse."""
    rng = np.random.default_rng(0)
    shift = rng.standard_normal(n_features)
    shift *= 3 / np.linalg.norm(shift)
    root = np.linalg.qr(rng.standard_normal((n_features, n_features)))[0] * np.arange(1, n_features + 1) ** (-spectrum / 2)

    def draw(n):
        labels = np.arange(n) % 2
        return (rng.standard_normal((n, n_features)) + labels[:, None] * shift) @ root.T, labels

    (features, labels), (fresh, fresh_labels) = draw(n_examples), draw(4000)
    plain, whitened = (
        auroc(fresh_labels, MassMeanClassifier(covariance=flag).fit(features, labels).decision_function(fresh))
        for flag in (False, True)
    )
    theta = features[labels == 1].mean(axis=0) - features[labels == 0].mean(axis=0)
    unshrunk = auroc(fresh_labels, fresh @ np.linalg.pinv(pooled_covariance(features, labels), rcond=1e-6) @ theta)
    assert whitened > unshrunk + 0.005
    assert whitened > plain + (0.05 if spectrum else -0.02)


def test_auroc_on_gaussian_classes_is_the_closed_form():
    """AUROC(mass-mean) = Phi(|d|^2 / sqrt(2 d'Sd)), AUROC(LDA) = Phi(sqrt(d'S^-1 d / 2))."""
    rng = np.random.default_rng(0)
    difference = np.array([1.0, 0.5, -0.5, 0.0])
    root = np.array([[1.5, 0, 0, 0], [0.8, 0.9, 0, 0], [0, 0.4, 1.0, 0], [0.3, 0, 0.9, 0.2]])
    sigma = root @ root.T

    def draw(n):
        labels = np.arange(n) % 2
        return rng.standard_normal((n, 4)) @ root.T + labels[:, None] * difference, labels

    features, labels = draw(40_000)
    fresh, fresh_labels = draw(40_000)
    mass_mean = norm.cdf(difference @ difference / np.sqrt(2 * difference @ sigma @ difference))
    lda = norm.cdf(np.sqrt(difference @ np.linalg.inv(sigma) @ difference / 2))
    assert lda - mass_mean > 0.05  # the two forms can be told apart
    for covariance, expected in [(False, mass_mean), (True, lda)]:
        fitted = MassMeanClassifier(covariance=covariance).fit(features, labels)
        assert auroc(fresh_labels, fitted.decision_function(fresh)) == pytest.approx(expected, abs=0.01)


def test_scale_and_intercept_are_those_of_a_logistic_regression_on_the_projections():
    features, labels = gaussian_classes(n_examples=4000)
    projections = features @ (features[labels == 1].mean(axis=0) - features[labels == 0].mean(axis=0))
    reference = LogisticRegression(C=np.inf, tol=1e-8).fit(projections[:, None], labels)
    fitted = MassMeanClassifier().fit(features, labels)
    np.testing.assert_allclose(
        fitted.predict_proba(features), reference.predict_proba(projections[:, None]), atol=2e-3
    )  # Platt's targets differ from 0 and 1 by 1 / 2000


def test_probabilities_are_calibrated_and_not_saturated():
    features, labels = gaussian_classes(n_examples=4000)
    fresh, fresh_labels = gaussian_classes(n_examples=4000, seed=1)
    probability = MassMeanClassifier().fit(features, labels).predict_proba(fresh)[:, 1]
    middle = (probability > 0.2) & (probability < 0.8)
    assert middle.sum() > 200
    assert fresh_labels[middle].mean() == pytest.approx(probability[middle].mean(), abs=0.06)
    theta = features[labels == 1].mean(axis=0) - features[labels == 0].mean(axis=0)
    raw = expit((fresh - fresh.mean(axis=0)) @ theta)  # the control: without the fitted scale, far more are near 0 or 1
    assert ((raw > 0.2) & (raw < 0.8)).sum() < middle.sum() / 3


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_separable_classes_give_finite_probabilities(n_classes, covariance):
    labels = np.arange(30) % n_classes
    features = 1000.0 * np.eye(n_classes)[labels] + np.random.default_rng(0).normal(0, 1e-3, (30, n_classes))
    fitted = MassMeanClassifier(covariance=covariance).fit(features, labels)
    assert (fitted.predict(features) == labels).all()
    assert fitted.predict_proba(features).min() > 0.0
    assert 0.8 < fitted.predict_proba(features).max() < 0.99


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.integers(0, 10_000), st.booleans())
def test_noise_and_rare_classes_never_flip_the_direction(class_sizes, seed, covariance):
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    labels = np.append(labels, [0, 1])  # some variance within the classes
    features = np.random.default_rng(seed).standard_normal((len(labels), 3))
    fitted = MassMeanClassifier(covariance=covariance).fit(features, labels)
    theta = fitted.class_means_[1] - fitted.class_means_[0]
    direction = fitted.coef_[0] if len(class_sizes) == 2 else fitted.coef_[1] - fitted.coef_[0]
    assert direction @ theta > 0


def test_redundant_features_do_the_whitened_direction_no_harm():
    features, labels = gaussian_classes()
    expected = MassMeanClassifier(covariance=True).fit(features, labels).decision_function(features)
    redundant = np.column_stack([features, features[:, :2], np.full(len(features), 3.0)])  # repeated, and constant
    found = MassMeanClassifier(covariance=True).fit(redundant, labels).decision_function(redundant)
    assert auroc(labels, found) == pytest.approx(auroc(labels, expected), abs=0.01)


def test_a_constant_feature_gets_no_weight_whatever_its_value():
    """0.1 is no binary fraction: its mean over 35 examples is another number, which is no variance."""
    features, labels = gaussian_classes(n_examples=35)
    constant = np.column_stack([features, np.full(35, 0.1)])
    fitted = MassMeanClassifier(covariance=True).fit(constant, labels)
    assert fitted.coef_[0, -1] == 0.0
    expected = MassMeanClassifier(covariance=True).fit(features, labels)
    np.testing.assert_allclose(fitted.coef_[0, :-1], expected.coef_[0])


def test_equal_class_means_leave_the_share_of_the_classes():
    features, labels = np.array([[1.0], [-1.0], [1.0], [-1.0], [0.0]]), np.array([0, 0, 1, 1, 1])
    fitted = MassMeanClassifier().fit(features, labels)
    assert fitted.coef_[0, 0] == 0.0
    assert 0.5 < fitted.predict_proba(features)[0, 1] < 0.6


def test_more_classes_without_shift_go_to_the_nearest_mean():
    features, labels = gaussian_classes(n_classes=4, n_examples=2000)
    fitted = MassMeanClassifier().fit(features, labels)
    distances = ((features[:, None] - fitted.class_means_) ** 2).sum(axis=2)
    assert (fitted.predict(features) == distances.argmin(axis=1)).mean() > 0.95
    # differences of coef_ are differences of means, times one scale
    np.testing.assert_allclose(
        (fitted.coef_[1:] - fitted.coef_[0]) / np.linalg.norm(fitted.coef_[1] - fitted.coef_[0]),
        (fitted.class_means_[1:] - fitted.class_means_[0]) / np.linalg.norm(fitted.class_means_[1] - fitted.class_means_[0]),
        atol=1e-12,
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(-4, 4), st.floats(-10, 10), st.booleans(), st.integers(2, 3))
def test_mass_mean_does_not_depend_on_unit_and_origin(exponent, offset, covariance, n_classes):
    features, labels = gaussian_classes(n_classes, n_examples=60)
    moved = (features + offset) * 10.0**exponent
    classifier = MassMeanClassifier(covariance=covariance)
    expected = classifier.fit(features, labels).predict_proba(features)
    np.testing.assert_allclose(classifier.fit(moved, labels).predict_proba(moved), expected, atol=1e-6)


def test_small_activations_keep_their_whitened_direction():
    """A cutoff of 1e-3 on Sigma itself would find nothing above it here."""
    features, labels = gaussian_classes()
    fitted = MassMeanClassifier(covariance=True).fit(features * 1e-3, labels)
    assert auroc(labels, fitted.decision_function(features * 1e-3)) > 0.9


@pytest.mark.parametrize("covariance", [False, True])
def test_a_weight_is_a_number_of_copies(covariance):
    features, labels = gaussian_classes(n_examples=60)
    weight = np.random.default_rng(0).integers(0, 4, 60)
    weighted = MassMeanClassifier(covariance=covariance).fit(features, labels, sample_weight=weight)
    copied = MassMeanClassifier(covariance=covariance).fit(np.repeat(features, weight, axis=0), np.repeat(labels, weight))
    np.testing.assert_allclose(weighted.coef_, copied.coef_, rtol=1e-6)
    np.testing.assert_allclose(weighted.intercept_, copied.intercept_, rtol=1e-6)
    assert not np.allclose(weighted.coef_, MassMeanClassifier(covariance=covariance).fit(features, labels).coef_)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.ones(3), r"shape \(3,\).*\(240,\)"),
        (-np.ones(240), "not negative"),
        (np.zeros(240), "zero for every example"),
        (np.arange(240) % 2, r"one class: \[1\]"),
    ],
)
def test_unusable_weights_are_named(weight, message):
    with pytest.raises(InputError, match=message):
        MassMeanClassifier().fit(*gaussian_classes(), sample_weight=weight)


def test_covariance_without_variance_is_refused():
    with pytest.raises(InputError, match="all examples are equal"):
        MassMeanClassifier(covariance=True).fit(np.eye(2), [0, 1])


# --- The linear rule

LINEAR = {
    "logistic": LogisticRegression(max_iter=1000),
    "logistic, no intercept": LogisticRegression(fit_intercept=False, max_iter=1000),
    "logistic CV": LogisticRegressionCV(Cs=3, scoring="neg_log_loss", max_iter=1000),
    "standard scaler": make_pipeline(StandardScaler(), LogisticRegression()),
    "standard scaler without mean": make_pipeline(StandardScaler(with_mean=False), LinearSVC()),
    "standard scaler without std": make_pipeline(StandardScaler(with_std=False), LinearSVC()),
    "min-max scaler": make_pipeline(MinMaxScaler(), LogisticRegression()),
    "robust scaler": make_pipeline(RobustScaler(), LogisticRegression()),
    "max-abs scaler": make_pipeline(MaxAbsScaler(), "passthrough", LogisticRegression()),
    "two scalers": make_pipeline(RobustScaler(), make_pipeline(MinMaxScaler(), LogisticRegression())),
    "PCA": make_pipeline(PCA(5, whiten=True), StandardScaler(), LogisticRegression()),
    "linear SVC": LinearSVC(),
    "ridge": RidgeClassifier(),
    "SGD hinge": SGDClassifier(random_state=0),
    "LDA svd": LinearDiscriminantAnalysis(),
    "LDA lsqr": LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    "LDA eigen": LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.1),
    "perceptron": Perceptron(random_state=0),
    "grid search": GridSearchCV(make_pipeline(StandardScaler(), LogisticRegression()), {"logisticregression__C": [0.1, 1]}),
    "mass-mean": MassMeanClassifier(),
    "mass-mean, whitened": MassMeanClassifier(covariance=True),
    "one against the rest, no probabilities": OneVsRestClassifier(LinearSVC()),
    "constant": DummyClassifier(strategy="prior"),
}
LINEAR_FOR_TWO_CLASSES = {
    "SGD log loss": SGDClassifier(loss="log_loss", random_state=0),
    "SVC": SVC(kernel="linear"),
    "one against the rest": OneVsRestClassifier(LogisticRegression()),
    "Platt scaling": CalibratedClassifierCV(LinearSVC(), ensemble=False),
}


def implied_probabilities(logits):
    return np.hstack([expit(-logits), expit(logits)]) if logits.shape[1] == 1 else softmax(logits, axis=1)


CASES = [
    *[pytest.param(model, k, id=f"{name}, {k} classes") for name, model in LINEAR.items() for k in (2, 3)],
    *[pytest.param(model, 2, id=f"{name}, 2 classes") for name, model in LINEAR_FOR_TWO_CLASSES.items()],
]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # LogisticRegressionCV announces new defaults
@pytest.mark.parametrize(("classifier", "n_classes"), CASES)
def test_the_rule_reproduces_scikit_learn_on_fresh_data(classifier, n_classes):
    features, labels = gaussian_classes(n_classes)
    fresh, _ = gaussian_classes(n_classes, seed=1)
    classifier = make_classifier(classifier, None).fit(features, labels)
    rule = linear_rule(classifier, features)
    n_outputs = 1 if n_classes == 2 else n_classes
    assert rule.direction.shape == (n_outputs, 12)
    assert rule.intercept.shape == (n_outputs,)
    assert rule.direction.dtype == rule.intercept.dtype == np.float64
    logits = rule.logits(fresh)
    if hasattr(classifier, "decision_function"):
        expected = classifier.decision_function(fresh)
        np.testing.assert_allclose(logits, expected[:, None] if expected.ndim == 1 else expected, rtol=1e-7, atol=1e-7)
    if hasattr(classifier, "predict_proba"):
        np.testing.assert_allclose(implied_probabilities(logits), classifier.predict_proba(fresh), atol=1e-7)


NONLINEAR = {
    "random forest": RandomForestClassifier(10, random_state=0),
    "neighbours": KNeighborsClassifier(),
    "SVC with a kernel": SVC(),
    "MLP": MLPClassifier(max_iter=2000, random_state=0),
    "naive Bayes": GaussianNB(),
    "QDA": QuadraticDiscriminantAnalysis(reg_param=0.1),
    "normalizer": make_pipeline(Normalizer(), LogisticRegression()),
    "clipped scaler": make_pipeline(MinMaxScaler(clip=True), LogisticRegression()),
    "calibrated ensemble": CalibratedClassifierCV(LinearSVC()),
    "always one class": DummyClassifier(strategy="most_frequent"),
}
NONLINEAR_FOR_THREE_CLASSES = {
    "normalised one against the rest": OneVsRestClassifier(LogisticRegression()),
    "SVC of pairs": SVC(kernel="linear", decision_function_shape="ovo"),
    "SVC of votes": SVC(kernel="linear"),
}
REFUSED = [
    *[pytest.param(model, k, id=f"{name}, {k} classes") for name, model in NONLINEAR.items() for k in (2, 3)],
    *[pytest.param(model, 3, id=f"{name}, 3 classes") for name, model in NONLINEAR_FOR_THREE_CLASSES.items()],
    pytest.param(SGDClassifier(loss="modified_huber", random_state=0), 2, id="SGD with another link"),
    pytest.param(FixedThresholdClassifier(LogisticRegression(), threshold=0.8), 2, id="moved threshold"),
]


@pytest.mark.parametrize(("classifier", "n_classes"), REFUSED)
def test_what_no_linear_rule_reproduces_is_refused(classifier, n_classes):
    features, labels = gaussian_classes(n_classes)
    classifier = make_classifier(classifier, None).fit(features, labels)
    with pytest.raises(NonlinearClassifierError, match=f"No linear rule reproduces {type(classifier).__name__}"):
        linear_rule(classifier, features)


@pytest.mark.parametrize("name", [name for name in LINEAR if "scaler" in name or name == "grid search"])
def test_scalers_are_folded_in_closed_form(name, monkeypatch):
    def refuse(*_):
        raise AssertionError("The rule was measured, though its coefficients were at hand.")

    monkeypatch.setattr(sys.modules["lmprobe_tl.estimators.linear_rule"], "_measured", refuse)
    features, labels = gaussian_classes()
    linear_rule(make_classifier(LINEAR[name], None).fit(features, labels), features)  # which compares it, too
    with pytest.raises(AssertionError):
        linear_rule(make_classifier(LINEAR["PCA"], None).fit(features, labels), features)


def test_coefficients_are_taken_as_they_are():
    features, labels = gaussian_classes(3)
    classifier = LogisticRegression(max_iter=1000).fit(features, labels)
    rule = linear_rule(classifier, features)
    assert (rule.direction == classifier.coef_).all()
    assert (rule.intercept == classifier.intercept_).all()


def test_the_refusal_says_what_deviates_and_what_to_do():
    features, labels = gaussian_classes()
    with pytest.raises(NonlinearClassifierError) as refusal:
        linear_rule(make_pipeline(StandardScaler(), SVC()).fit(features, labels), features)
    message = str(refusal.value)
    assert "Pipeline of SVC: decision_function deviates from a linear rule by up to" in message
    assert "predict" in message
    assert "'mass_mean'" in message
    assert "LinearSVC" in message
    with pytest.raises(NonlinearClassifierError, match="log-odds of predict_proba is infinite"):
        linear_rule(DummyClassifier(strategy="most_frequent").fit(features, labels), features)


class Decides(ClassifierMixin, BaseEstimator):
    """Two classes by the sign of any function of the features; on the boundary the positive one."""

    def __init__(self, function):
        self.function = function

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, X):
        return self.function(X)

    def predict(self, X):
        return self.classes_[(self.function(X) >= 0).astype(int)]


def standard_features():
    features, labels = gaussian_classes()
    return (features - features.mean(axis=0)) / features.std(axis=0), labels


def test_a_slight_bend_is_found_and_a_larger_tolerance_lets_it_pass():
    features, labels = standard_features()
    bent = Decides(lambda X: X[:, 0] + 1e-3 * X[:, 0] ** 2).fit(features, labels)
    with pytest.raises(NonlinearClassifierError, match="decision_function deviates"):
        linear_rule(bent, features)
    rule = linear_rule(bent, features, tolerance=0.2)
    assert rule.direction[0, 0] == pytest.approx(1.0, abs=0.01)


def test_a_bend_beyond_the_training_data_is_found():
    features, labels = standard_features()
    assert np.abs(features[:, 0]).max() < 5.0
    for limit, is_linear in [(5.0, False), (50.0, True)]:
        clipped = Decides(lambda X, limit=limit: np.clip(X[:, 0], -limit, limit)).fit(features, labels)
        if is_linear:
            assert linear_rule(clipped, features).direction[0, 0] == pytest.approx(1.0)
        else:
            with pytest.raises(NonlinearClassifierError):
                linear_rule(clipped, features)


def test_a_bend_is_measured_against_the_spread_on_the_training_data():
    """Random points leave the correlation of the features, and respond a thousand times as much."""
    features, labels = standard_features()
    features[:, 1] = features[:, 0] + 1e-3 * features[:, 1]
    for height, is_linear in [(0.05, False), (0.0, True)]:

        def bump(X, height=height):
            contrast = 1e3 * (X[:, 1] - X[:, 0])
            return contrast + height * contrast**2 * np.exp(-(contrast**2))

        classifier = Decides(bump).fit(features, labels)
        if is_linear:
            assert linear_rule(classifier, features).direction[0, 1] == pytest.approx(1e3)
        else:
            with pytest.raises(NonlinearClassifierError):
                linear_rule(classifier, features)


def test_points_on_the_boundary_may_go_to_either_class():
    features, labels = standard_features()
    features[:5, 0] = 0.0
    assert linear_rule(Decides(lambda X: X[:, 0]).fit(features, labels), features).direction[0, 0] == pytest.approx(1.0)


@settings(deadline=None, max_examples=25)
@given(st.integers(-6, 6), st.floats(-100, 100), st.integers(2, 3), st.sampled_from(["folded", "measured", "log-odds"]))
def test_the_rule_holds_for_any_unit_and_origin(exponent, offset, n_classes, path):
    features, labels = gaussian_classes(n_classes, n_examples=60)
    fresh, _ = gaussian_classes(n_classes, n_examples=60, seed=1)
    features, fresh = (features + offset) * 10.0**exponent, (fresh + offset) * 10.0**exponent
    reducer = PCA(5) if path == "measured" else StandardScaler()
    classifier = make_pipeline(reducer, StandardScaler(), LogisticRegression()).fit(features, labels)
    expected = classifier.predict_proba(fresh)
    fitted = OnlyProbabilities(classifier).fit(features, labels) if path == "log-odds" else classifier
    np.testing.assert_allclose(implied_probabilities(linear_rule(fitted, features).logits(fresh)), expected, atol=1e-6)


class OnlyProbabilities(ClassifierMixin, BaseEstimator):
    """A fitted classifier with its decision_function hidden; counts the largest batch it was asked for."""

    def __init__(self, inner):
        self.inner = inner

    def fit(self, X, y):
        self.classes_, self.largest_batch_ = self.inner.classes_, 0
        return self

    def predict_proba(self, X):
        self.largest_batch_ = max(self.largest_batch_, X.size)
        return self.inner.predict_proba(X)

    def predict(self, X):
        return self.inner.predict(X)


def test_sure_probabilities_still_show_their_log_odds():
    """Well separated classes, most of them positive: predict_proba is exactly 1 on every training example of theirs."""
    labels = (np.arange(200) % 10 > 0).astype(int)
    features = np.random.default_rng(0).standard_normal((200, 3)) + 20.0 * labels[:, None] * [1.0, 0.0, 0.0]
    inner = LogisticRegression().fit(features, labels)
    inner.coef_, inner.intercept_ = np.array([[12.0, 3.0, -2.0]]), np.array([-120.0])
    assert (inner.predict_proba(features)[labels == 1, 1] == 1.0).all()
    rule = linear_rule(OnlyProbabilities(inner).fit(features, labels), features)
    np.testing.assert_allclose(rule.direction, inner.coef_, rtol=1e-6)
    np.testing.assert_allclose(rule.intercept, inner.intercept_, rtol=1e-6)


def test_sure_probabilities_do_not_hide_a_curve():
    features, labels = gaussian_classes(n_features=200)
    curved = GaussianNB().fit(features, labels)
    assert np.mean(curved.predict_proba(features).max(axis=1) > 1 - 1e-9) > 0.9
    with pytest.raises(NonlinearClassifierError, match="log-odds of predict_proba deviates"):
        linear_rule(curved, features)


def test_many_features_are_measured_in_bounded_batches():
    features, labels = gaussian_classes(n_examples=40, n_features=4096)
    inner = LogisticRegression().fit(features, labels)
    classifier = OnlyProbabilities(inner).fit(features, labels)
    rule = linear_rule(classifier, features)
    np.testing.assert_allclose(rule.direction, inner.coef_, atol=1e-6 * np.abs(inner.coef_).max())
    assert classifier.largest_batch_ <= 2**22 < 4096 * 4096


def test_constant_features_take_part():
    features, labels = gaussian_classes()
    features[:, 3] = 7.0
    for classifier in (make_classifier("logistic_regression", 0), make_pipeline(PCA(), LogisticRegression())):
        classifier.fit(features, labels)
        moved = features + np.eye(12)[3] * 5.0
        np.testing.assert_allclose(
            linear_rule(classifier, features).logits(moved)[:, 0], classifier.decision_function(moved), atol=1e-9
        )


def test_float32_features_and_classifiers_pass():
    features, labels = gaussian_classes()
    features = features.astype(np.float32)
    classifier = make_classifier("logistic_regression", 0).fit(features, labels)
    np.testing.assert_allclose(
        linear_rule(classifier, features).logits(features)[:, 0], classifier.decision_function(features), atol=1e-4
    )


@pytest.mark.parametrize(("features", "message"), [(np.ones(3), r"shape \(3,\)"), (np.full((2, 12), np.nan), "finite")])
def test_unusable_features_are_named(features, message):
    classifier = LogisticRegression(max_iter=1000).fit(*gaussian_classes())
    with pytest.raises(InputError, match=message):
        linear_rule(classifier, features)


def test_an_unfitted_classifier_has_no_rule():
    with pytest.raises(NotFittedError):
        linear_rule(make_classifier("logistic_regression", 0), np.ones((2, 3)))


def test_without_any_response_there_is_no_rule():
    class Silent(ClassifierMixin, BaseEstimator):
        def fit(self, X, y):
            self.classes_ = np.unique(y)
            return self

        def predict(self, X):
            return np.zeros(len(X))

    with pytest.raises(NonlinearClassifierError, match="neither decision_function nor predict_proba"):
        linear_rule(Silent().fit(None, [0, 1]), np.ones((2, 3)))
