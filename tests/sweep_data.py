"""Prompts for tests of sweeps: which of them a bag of tokens can tell apart, and which need a model."""

from __future__ import annotations

import random

NOISE = ("the", "model", "reads", "every", "word", "short", "line", "then", "writes", "music", "light", "rain", "sun")


def noise(seed: int, n_prompts: int, n_words: int = 5) -> list[list[str]]:
    rng = random.Random(seed)
    return [rng.choices(NOISE, k=n_words) for _ in range(n_prompts)]


def with_a_word(n_prompts: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Noise that ends in 'cats' where the label is 1, else in 'more': a bag of tokens can tell."""
    labels = [at % 2 for at in range(n_prompts)]
    return [
        " ".join([*words, ("more", "cats")[label]]) for words, label in zip(noise(seed, n_prompts), labels, strict=True)
    ], labels


def in_another_order(n_prompts: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Noise between 'cats' and 'dogs', the last of which is the label: a bag of tokens cannot tell."""
    labels = [at % 2 for at in range(n_prompts)]
    ends = (("cats", "dogs"), ("dogs", "cats"))
    return [
        " ".join(["the", ends[label][0], *words, ends[label][1]])  # a first word would be another token
        for words, label in zip(noise(seed, n_prompts), labels, strict=True)
    ], labels
