"""Scores from a server: `lmprobe-tl serve --model M --probe deceit.safetensors`, asked with the official openai package.

    python examples/vllm_client.py http://localhost:8000/v1 "Tell me about yourself."

The same without Python:

    curl -s localhost:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"model": "M", "prompt": "Tell me", "max_tokens": 50, "probe_stop": true}'
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main(url: str, prompt: str) -> None:
    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id

    # Fields that OpenAI does not know go into extra_body, and come back as attributes of each choice.
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=20, temperature=0)
    choice = answer.choices[0]
    print(choice.text)
    for name, logits in choice.probe_scores.items():
        known = [f"{logit:.2f}" for logit in logits if logit is not None]
        print(f"{name}: {len(known)} positions with a score, the last {known[-1:]}; running {choice.probe_running[name]}")
    for alarm in choice.probe_alarms:
        print(f"alarm of {alarm['probe']} at position {alarm['position']}: {alarm['score']:.3f} {alarm['unit']}")

    # A stream tells what is new in each chunk, and ends at the first alarm.
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=20, temperature=0, stream=True, extra_body={"probe_stop": True}
    )
    for chunk in stream:
        for choice in chunk.choices:
            running = {name: None if score is None else round(score, 3) for name, score in choice.probe_running.items()}
            print(repr(choice.text), running, [alarm["probe"] for alarm in choice.probe_alarms])
            if choice.probe_stopped_by is not None:
                print(f"stopped by {choice.probe_stopped_by}")


if __name__ == "__main__":
    main(*sys.argv[1:])
