"""The baseline without a model: which tokens a text holds, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline


def make_token_bag(random_state: int | None = 0) -> Any:
    """Unfitted TF-IDF (sublinear) and logistic regression on lists of token ids: one a prompt, or of a single token each."""
    vectorizer = TfidfVectorizer(analyzer=_as_is, sublinear_tf=True)
    return make_pipeline(vectorizer, LogisticRegression(C=10.0, max_iter=2000, random_state=random_state))


def as_documents(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of token ids as an array of lists, which can be indexed by a split."""
    documents = np.empty(len(rows), dtype=object)
    documents[:] = [[str(token) for token in row] for row in rows]
    return documents


def _as_is(document: list[str]) -> list[str]:
    return document
