"""Writes probe_files/: probes fitted under TransformerLens 4, and the scores that they gave there.

Run by hand in the main environment, where the format of probe files changes: .venv/bin/python tests/tl3/make_probe_files.py
"""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from tiny_models import NAMES, save_tiny

from lmprobe_tl import Probe, load_probe, score_prompts

FOLDER = Path(__file__).parent / "probe_files"
POSITIVE = ["cats sun music light", "dogs rain", "sun music", "light rain and sun", "cats and dogs", "music light"]
NEGATIVE = ["we look at what it said", "nobody asked", "any of this today", "ever before", "in all long years", "so we said"]
PROMPTS = ["the model writes about music", "cats", "nobody reads a long line today and then we look"]


def main() -> None:
    assert version("transformer-lens").startswith("4."), version("transformer-lens")
    FOLDER.mkdir(exist_ok=True)
    scores = {}
    with tempfile.TemporaryDirectory() as root:
        for name in NAMES:
            model = str(save_tiny(name, Path(root) / f"tiny-{name}"))
            probe = Probe(
                model, hook_points=[1, 3], pooling="mean", inference_pooling="score:max", random_state=0, name=name
            )
            probe.fit_contrast(POSITIVE, NEGATIVE)
            path = probe.save(FOLDER / f"{name}.safetensors")
            found = score_prompts(model, PROMPTS, load_probe(path))[name]
            scores[name] = {"scores": found.scores.tolist(), "token_logits": [row.tolist() for row in found.token_logits]}
    (FOLDER / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
