"""Attach probe files to a model of your own code's choosing, and read the scores after any call of it."""

import torch

from lmprobe_tl import ProbeWeights, attach_probes
from lmprobe_tl.demo import load_demo_model

model = load_demo_model()
torch.manual_seed(0)

# Any direction can be a probe; here a random one, and one that reads how strongly the model expects a line end.
line_end = model.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
probes = [
    ProbeWeights.from_direction(torch.randn(192), name="random", hook_points=("blocks.2.hook_resid_post",)),
    ProbeWeights.from_direction(model.W_U[:, line_end].detach(), name="line_end", hook_points=("blocks.5.hook_resid_post",)),
]

tokens = model.to_tokens("def area(width, height):\n    return width *")
with attach_probes(model, probes) as monitor:
    output = model.generate(tokens, max_new_tokens=12, do_sample=False, verbose=False, return_type="tokens")

print(repr(model.tokenizer.decode(output[0], skip_special_tokens=True)))
for name in ("random", "line_end"):
    (scores,) = monitor.token_scores(name)
    print(f"{name}: {len(scores)} scores, highest {float(scores.max()):.2f} at token {int(scores.argmax())}")
