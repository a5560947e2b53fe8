"""Train a probe, save it, reload it, and watch it score tokens while the model generates.

Runs offline on the embedded model; replace `load_demo_model()` by a TransformerBridge of your own.
"""

import torch

from lmprobe_tl import Probe, load_probe, monitored_generate
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

model = load_demo_model()
probe = Probe(model, hook_points=3, pooling="all", random_state=0, name="prose")
probe.fit_contrast(positive=PROSE, negative=CODE)
print("trained on", probe.training_.n_examples, "tokens; accuracy on them", probe.score(PROSE + CODE, [1] * 6 + [0] * 6))

path = probe.save("prose.safetensors")
weights = load_probe(path)

torch.manual_seed(0)
(result,) = monitored_generate(model, ["def load(path):\n"], [weights], max_new_tokens=24, score_last_token=True)
for token, logit in zip(result.tokens, result.scores["prose"], strict=True):
    print(f"{float(logit):7.2f}  {model.tokenizer.decode(token)!r}")
for alarm in result.alarms:
    print(f"first above the threshold at token {alarm.position}: {alarm.score:.2f} >= {alarm.threshold}")
