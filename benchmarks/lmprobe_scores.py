"""lmprobe trains a probe and scores test prompts, in a process of its own that imports nothing of this package.

{"folder", "layer", "pooling", "seed", "train", "labels", "test"} on stdin; {"scores"} or {"error"} on stdout.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what lmprobe prints is no answer
    import numpy as np
    from lmprobe import Probe

    asked = json.load(sys.stdin)
    probe = Probe(
        asked["folder"], asked["layer"], asked["pooling"], device="cpu", dtype="float32", random_state=asked["seed"]
    )
    try:
        probe.fit(asked["train"], np.array(asked["labels"]))
        answer = {"scores": probe.predict_proba(asked["test"])[:, 1].tolist()}
    except Exception as error:  # that it cannot is a result
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
