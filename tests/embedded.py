"""The embedded demo model, loaded once for all tests that want it."""

from __future__ import annotations

from functools import cache
from typing import Any

from lmprobe_tl.demo import MODEL_FOLDER, load_demo_model


@cache
def embedded_model() -> Any:
    return load_demo_model()


@cache
def embedded_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_FOLDER)
