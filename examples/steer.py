"""Ask whether the model uses a probe's direction, and does not just carry it: steer by it, and take it out.

Runs offline on the embedded model; replace `load_demo_model()` by a TransformerBridge of your own.
"""

import bisect
import cmd
import code
import inspect
import queue
import sched
import shelve

import torch

from lmprobe_tl import Probe, ablate, steer
from lmprobe_tl.demo import load_demo_model

CODE = [
    "x = load(path)\n",
    "for item in items:\n",
    "return self.name\n",
    "import os, sys\n",
    "if not ready:\n",
    "count += 1\n",
]
PROSE = [
    "# This is the default.\n",
    "# See the notes below.\n",
    '"""Return the name."""\n',
    "# The first is used.\n",
    '"""Read a file."""\n',
    "# Not used any more\n",
]
TEXTS = [inspect.getsource(module)[:400] for module in (queue, sched, shelve, cmd, bisect, code)]

model = load_demo_model()
probe = Probe(model, hook_points=3, pooling="all", classifier="mass_mean", random_state=0, name="prose")
weights = probe.fit_contrast(positive=PROSE, negative=CODE).weights_
(hook_point,) = weights.hook_points

# Steering: the same prompt, with the probe's logit moved at every position.
prompt = model.to_tokens("def load(path):\n")
for coefficient in (-8.0, 0.0, 8.0):
    with steer(model, weights, coefficient=coefficient, unit="logit"):
        output = model.generate(prompt, max_new_tokens=16, do_sample=False, verbose=False, return_type="tokens")
    print(f"logit {coefficient:+.0f}: {model.tokenizer.decode(output[0, prompt.shape[1] :])!r}")

# Ablation: how much worse the model predicts, next to what as large a change in a random direction does.
rows = [model.to_tokens(text) for text in TEXTS]


def loss() -> float:
    """Mean loss of a next token over all texts."""
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(row)[0, :-1], row[0, 1:], reduction="none") for row in rows]
    return float(torch.cat(losses).mean())


plain = loss()
with ablate(model, weights) as change:
    ablated = loss()
print(change[hook_point])
print(f"loss {plain:.3f}; with the direction taken out {ablated:.3f}")

torch.manual_seed(0)
for _ in range(5):
    with steer(model, torch.randn(192), coefficient=change[hook_point].mean_norm, hook_points=hook_point):
        print(f"    with as large a change in a random direction {loss():.3f}")
