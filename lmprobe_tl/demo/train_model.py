"""Train the embedded demo model: a 3 M parameter Llama on the source of Python's standard library.

    python -m lmprobe_tl.demo.train_model --out lmprobe_tl/demo/stdlib-llama-3m --work build/demo-model

writes a Hugging Face folder (config, tokenizer, float16 safetensors, `training.json` with the losses and the baselines).
About 50 minutes on two CPU cores; it resumes from its last checkpoint in `--work`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sysconfig
import time
import tokenize
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmprobe_tl.demo.task import PROBE_EVAL_MODULES, PROBE_TRAIN_MODULES, stdlib_source

VOCAB_SIZE = 2048
CONTEXT = 512
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# Tables, not text; and modules of which the standard library carries a near copy.
EXCLUDED_PARTS = ("site-packages", "encodings", "pydoc_data", "lib2to3", "turtledemo", "idle_test", "cjkencodings")
TOKENS_PER_STEP = 8192


def training_files() -> list[Path]:
    """Every standard-library source file that is not held out for the probes, in sorted order."""
    root = Path(sysconfig.get_path("stdlib"))
    held_out = {root / f"{name}.py" for name in PROBE_TRAIN_MODULES + PROBE_EVAL_MODULES}
    held_out |= {root / name / "__init__.py" for name in PROBE_TRAIN_MODULES + PROBE_EVAL_MODULES}
    files = sorted(root.rglob("*.py"))
    return [
        path
        for path in files
        if path not in held_out
        and not set(EXCLUDED_PARTS) & set(path.relative_to(root).parts)
        and 500 < path.stat().st_size < 400_000
    ]


def read_sources(files: list[Path]) -> list[str]:
    """Texts of the files that decode as their own coding line says; test data with broken encodings is left out."""
    texts = []
    for path in files:
        try:
            with tokenize.open(path) as file:
                texts.append(file.read())
        except (SyntaxError, UnicodeDecodeError):
            continue
    return texts


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which quotes, '#' and line ends stay apart from their neighbours, so that no token straddles a
    label."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\"\"\"|'''|[\"'#]|\\n+ *"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode_files(tokenizer: Any, texts: list[str]) -> np.ndarray:
    """One stream of token ids [n_tokens]: BOS, text, EOS for each file."""
    stream: list[np.ndarray] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        stream.append(np.array([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], dtype=np.uint16))
    return np.concatenate(stream)


def build_model(vocab_size: int) -> LlamaForCausalLM:
    """The untrained model: 6 layers, d_model 192, tied embeddings, 3.05 M parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def sample_batch(stream: np.ndarray, length: int, generator: np.random.Generator, bos: int) -> Tensor:
    """Random windows [batch length] of the stream; each starts with BOS, as prompts do."""
    rows = TOKENS_PER_STEP // length
    starts = generator.integers(0, len(stream) - length, size=rows)
    windows = np.stack([stream[start : start + length] for start in starts]).astype(np.int64)
    windows[:, 0] = bos
    return torch.from_numpy(windows)


def learning_rate(step: int, steps: int, peak: float = 2e-3) -> float:
    """Warm up over 100 steps, hold, and fall linearly to zero over the last 40 %."""
    return peak * min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))


def loss_of_batch(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, stream: np.ndarray, bos: int) -> float:
    """Mean cross-entropy in nats a token over the whole stream, in windows of the full context, each begun with BOS."""
    model.eval()
    total, count = 0.0, 0
    step = CONTEXT - 1
    for start in range(0, len(stream) - 1, step):
        window = np.concatenate([[bos], stream[start : start + step].astype(np.int64)])
        ids = torch.from_numpy(window)[None]
        logits = model(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(window) - 1
    model.train()
    return total / count


def ngram_losses(train: np.ndarray, valid: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Cross-entropy (nats a token) of a unigram and of an interpolated trigram with Witten-Bell smoothing, same tokens."""
    train64, valid64 = train.astype(np.int64), valid.astype(np.int64)
    unigram = (np.bincount(train64, minlength=vocab_size) + 1) / (len(train64) + vocab_size)
    probability = unigram[valid64]
    losses = {"unigram": float(-np.log(probability).mean())}
    for order in (2, 3):
        # Witten & Bell 1991: lambda = n(h) / (n(h) + distinct successors of h)
        history_train = sum(train64[order - 1 - k : len(train64) - k] * vocab_size**k for k in range(1, order))
        history_valid = sum(valid64[order - 1 - k : len(valid64) - k] * vocab_size**k for k in range(1, order))
        gram_train = history_train * vocab_size + train64[order - 1 :]
        gram_valid = history_valid * vocab_size + valid64[order - 1 :]
        grams, gram_counts = np.unique(gram_train, return_counts=True)
        histories, history_counts = np.unique(history_train, return_counts=True)
        types = np.unique(grams // vocab_size, return_counts=True)[1]
        n_gram, n_history = _look_up(grams, gram_counts, gram_valid), _look_up(histories, history_counts, history_valid)
        n_types = _look_up(histories, types, history_valid)
        longer = probability.copy()
        seen = n_history > 0
        at = np.arange(order - 1, len(valid64))[seen]
        longer[at] = (n_gram[seen] + n_types[seen] * probability[at]) / (n_history[seen] + n_types[seen])
        probability = longer
        losses[{2: "bigram", 3: "trigram"}[order]] = float(-np.log(probability).mean())
    return losses


def _look_up(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    index = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[index] == wanted, counts[index], 0)


def export(model: LlamaForCausalLM, tokenizer: Any, out: Path, record: dict[str, Any]) -> None:
    """Write the Hugging Face folder; float16 weights on disk, loaded as float32."""
    half = build_model(model.config.vocab_size)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older releases of Transformers know, too
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (out / "model.safetensors").chmod(0o644)
    (out / "training.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    files = training_files()
    texts = read_sources(files)
    tokenizer = train_tokenizer(texts)
    train = encode_files(tokenizer, texts)
    valid_texts = [text for name in PROBE_EVAL_MODULES if (text := stdlib_source(name)) is not None]
    valid = encode_files(tokenizer, valid_texts)
    print(f"{len(texts)} files, {len(train):,} training tokens, {len(valid):,} validation tokens", flush=True)

    model = build_model(len(tokenizer))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95), fused=True
    )
    checkpoint = arguments.work / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    began = time.monotonic()
    for step in range(first, arguments.steps):
        # Long windows cost more a token: most of the training runs on half the context, the last quarter on all of it.
        length = CONTEXT if step >= 0.75 * arguments.steps else CONTEXT // 2
        batch = sample_batch(train, length, np.random.default_rng((arguments.seed, step)), tokenizer.bos_token_id)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps)
        loss = loss_of_batch(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the training loss became {loss.item()} at step {step}; lower the peak learning rate")
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.monotonic() - began:.0f} s", flush=True)
        if (step + 1) % 100 == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, checkpoint)
        if (step + 1) % 500 == 0 or step + 1 == arguments.steps:
            record = {
                "steps": step + 1,
                "steps_planned": arguments.steps,
                "seed": arguments.seed,
                "parameters": sum(p.numel() for p in model.parameters()),
                "training_files": len(texts),
                "training_tokens": len(train),
                "tokens_seen": (step + 1) * TOKENS_PER_STEP,
                "validation_modules": list(PROBE_EVAL_MODULES),
                "validation_tokens": len(valid),
                "validation_loss_nats_per_token": {
                    "model": round(validation_loss(model, valid, tokenizer.bos_token_id), 4),
                    **{k: round(v, 4) for k, v in ngram_losses(train, valid, len(tokenizer)).items()},
                },
                "python": platform.python_version(),
                "torch": torch.__version__,
            }
            print(json.dumps(record["validation_loss_nats_per_token"]), flush=True)
            export(model, tokenizer, arguments.out, record)


if __name__ == "__main__":
    main()
