"""The embedded demo model, its task, and the main job that `lmprobe-tl demo` runs."""

from pathlib import Path
from typing import Any

MODEL_FOLDER = Path(__file__).parent / "stdlib-llama-3m"


def load_demo_model() -> Any:
    """The embedded 3 M parameter Llama, trained on the source of Python's standard library, as a TransformerLens bridge.

    `MODEL_FOLDER` is an ordinary Hugging Face folder: Transformers and vLLM load it, too.
    """
    from lmprobe_tl.hook_points import load_model

    return load_model(MODEL_FOLDER)
