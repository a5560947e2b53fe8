"""Where a probe comes from: what its file says of data, classifier and software."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

_PACKAGES = ("lmprobe-tl", "torch", "transformer-lens", "scikit-learn")


def data_hash(digests: Sequence[bytes], labels: np.ndarray) -> str:
    """SHA-256 of the digests of each prompt's token ids and of the labels, in order."""
    return hashlib.sha256(b"".join(digests) + json.dumps(labels.tolist()).encode()).hexdigest()


def classifier_name(classifier: Any) -> str:
    """The name as given, or a classifier's repr on one line."""
    return classifier if isinstance(classifier, str) else " ".join(repr(classifier).split())


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a probe's numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Of the tokens and their ids."""
    return text_fingerprint(json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))))


def text_fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
