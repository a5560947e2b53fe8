"""The parts of the embedded model's training script that compute something: against plain loops."""

from __future__ import annotations

import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from embedded import embedded_tokenizer

from lmprobe_tl.demo.task import PROBE_EVAL_MODULES, PROBE_TRAIN_MODULES
from lmprobe_tl.demo.train_model import (
    CONTEXT,
    TOKENS_PER_STEP,
    encode_files,
    learning_rate,
    ngram_losses,
    read_sources,
    sample_batch,
    training_files,
)


def witten_bell(train: list[int], valid: list[int], vocab_size: int) -> list[float]:
    """Losses of the orders 1 to 3, one token at a time."""
    followers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for at, token in enumerate(train):
        for length in (1, 2):
            if at >= length:
                followers[tuple(train[at - length : at])][token] += 1
    logs: list[list[float]] = [[], [], []]
    for at, token in enumerate(valid):
        probability = (train.count(token) + 1) / (len(train) + vocab_size)
        logs[0].append(np.log(probability))
        for length in (1, 2):
            after = followers.get(tuple(valid[at - length : at])) if at >= length else None
            if after:
                probability = (after[token] + len(after) * probability) / (after.total() + len(after))
            logs[length].append(np.log(probability))
    return [-float(np.mean(one)) for one in logs]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ngram_losses_are_those_of_a_plain_loop(seed: int) -> None:
    generator = np.random.default_rng(seed)
    train = generator.choice(7, p=[0.4, 0.2, 0.2, 0.1, 0.06, 0.04, 0], size=300).astype(np.uint16)
    valid = generator.integers(0, 7, size=80).astype(np.uint16)  # token 6 never occurs in training
    losses = ngram_losses(train, valid, 9)
    assert list(losses) == ["unigram", "bigram", "trigram"]
    np.testing.assert_allclose(list(losses.values()), witten_bell(train.tolist(), valid.tolist(), 9), rtol=1e-12)


def test_ngram_probabilities_sum_to_one_after_every_history() -> None:
    train = np.random.default_rng(0).integers(0, 4, size=60).astype(np.uint16)
    for history in ([0, 1], [3, 3], [2, 4]):  # token 4 never occurs
        # the loss of a sequence of three differs from another only by its last token
        losses = np.array([3 * ngram_losses(train, np.array([*history, token]), 5)["trigram"] for token in range(5)])
        first_two = 2 * ngram_losses(train, np.array(history), 5)["trigram"]
        assert np.exp(first_two - losses).sum() == pytest.approx(1)


def test_learning_rate_warms_up_holds_and_falls_to_zero() -> None:
    rates = np.array([learning_rate(step, 1000, peak=1.0) for step in range(1001)])
    np.testing.assert_allclose(rates[:100], np.arange(1, 101) / 100)
    np.testing.assert_allclose(rates[100:601], 1)
    np.testing.assert_allclose(rates[600:], np.linspace(1, 0, 401), atol=1e-12)


def test_no_held_out_module_is_trained_on() -> None:
    files = training_files()
    root = Path(sysconfig.get_path("stdlib"))
    held_out = {
        path
        for name in PROBE_TRAIN_MODULES + PROBE_EVAL_MODULES
        for path in (root / f"{name}.py", *(root / name).rglob("*.py"))
    }
    relative = {str(path.relative_to(root)) for path in set(files) & held_out}
    assert not relative
    assert len(files) > 300
    assert files == sorted(files)
    assert root / "inspect.py" in files
    assert not [path for path in files if "site-packages" in path.parts or "encodings" in path.parts]


def test_sources_that_do_not_decode_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_bytes("# coding: latin-1\nx = 'é'\n".encode("latin-1"))
    (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "bad_later.py").write_bytes(b"\n" * 2000 + b"x = '\xff'\n")
    (tmp_path / "unknown.py").write_bytes(b"# coding: no-such-thing\n")
    assert read_sources(sorted(tmp_path.iterdir())) == ["# coding: latin-1\nx = 'é'\n"]


def test_files_become_one_stream_with_bos_and_eos_around_each() -> None:
    tokenizer = embedded_tokenizer()
    stream = encode_files(tokenizer, ["a = 1\n", "b\n"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a = 1\n", "b\n"))
    assert stream.tolist() == [bos, *first, eos, bos, *second, eos]


@pytest.mark.parametrize("length", [CONTEXT // 2, CONTEXT])
def test_batches_are_windows_of_the_stream_that_begin_with_bos(length: int) -> None:
    stream = np.arange(10, 3000, dtype=np.uint16)
    batch = sample_batch(stream, length, np.random.default_rng(0), bos=1)
    assert batch.shape == (TOKENS_PER_STEP // length, length)
    assert (batch[:, 0] == 1).all()
    assert (batch[:, 2:] - batch[:, 1:-1] == 1).all()
    assert len({row[1].item() for row in batch}) > 2
    again = sample_batch(stream, length, np.random.default_rng(0), bos=1)
    assert (batch == again).all()
