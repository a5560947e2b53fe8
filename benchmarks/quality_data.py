"""Real labelled texts: the sets of the package sae-probes that a fixed rule takes, each parted in training and test prompts.

The package is downloaded, never installed; its sets have licences of their own, and none of them is kept here.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.wheels import wheel
from lmprobe_tl.splits import held_out

PACKAGE = "sae-probes==0.4.2"
FOLDER_IN_WHEEL = "sae_probes/data/cleaned_data/"

# The rule: every set of two classes with so many different texts of each, most of them short, of those numbered up to
# LAST_NUMBER (later ones are single classes of earlier ones, or code); and of one source the first few only.
LAST_NUMBER = 113
FEWEST_OF_A_CLASS = 500
LONGEST_TEXT, SHARE_AS_SHORT = 350, 0.9  # characters
SETS_OF_A_SOURCE = 2
SOURCES = {
    "historical figures": range(2, 8),
    "headlines": range(21, 27),
    "Wikidata": range(56, 65),
    "two-word terms": range(65, 86),
}

_BORDERS = re.compile(r"\n| \| |\[SEP\]")
_SHORTEST_PART, _BEGINNING = 20, 40  # characters that two texts of one group share


@dataclass(frozen=True)
class LabelledTexts:
    """Different texts with labels [n] of 0 and 1, and groups [n]: texts of one group share a part, such as the question."""

    name: str
    texts: list[str]
    labels: np.ndarray
    groups: np.ndarray

    def part(self, indices: Sequence[int] | np.ndarray) -> LabelledTexts:
        return LabelledTexts(self.name, [self.texts[index] for index in indices], self.labels[indices], self.groups[indices])


def number_of(name: str) -> int:
    return int(name.partition("_")[0])


def chosen_sets(folder: Path) -> list[LabelledTexts]:
    """Every set that the rule takes, by number. folder: where the wheel is, or is downloaded to."""
    taken: list[LabelledTexts] = []
    of_source: dict[str, int] = {}
    for name, rows in read_sets(wheel(PACKAGE, folder)):
        source = next((source for source, numbers in SOURCES.items() if number_of(name) in numbers), name)
        if of_source.get(source, 0) < SETS_OF_A_SOURCE and (found := labelled_texts(name, rows)) is not None:
            taken.append(found)
            of_source[source] = of_source.get(source, 0) + 1
    return taken


def read_sets(path: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Name and (text, label) pairs of each set up to LAST_NUMBER, by number."""
    import pyarrow  # TransformerLens brings it, and it reads Zstandard

    csv.field_size_limit(2**24)
    with zipfile.ZipFile(path) as archive:
        files = [name for name in archive.namelist() if name.startswith(FOLDER_IN_WHEEL) and name.endswith(".csv.zst")]
        names = {name.removeprefix(FOLDER_IN_WHEEL).removesuffix(".csv.zst"): name for name in files}
        for name in sorted(names, key=number_of):
            if number_of(name) <= LAST_NUMBER:
                with pyarrow.input_stream(io.BytesIO(archive.read(names[name])), compression="zstd") as stream:
                    lines = csv.DictReader(io.StringIO(stream.read().decode(), newline=""))
                    yield name, [(line["prompt"], line["target"]) for line in lines]


def labelled_texts(name: str, rows: Iterable[tuple[str, str]]) -> LabelledTexts | None:
    """The set, each text once (whatever its case and spaces), texts with two labels left out; None where the rule does not
    take it. The label that sorts last is 1."""
    first: dict[str, tuple[str, str]] = {}
    contradicted: set[str] = set()
    for text, label in rows:
        key = " ".join(text.casefold().split())
        if first.setdefault(key, (text, label))[1] != label:
            contradicted.add(key)
    kept = [pair for key, pair in first.items() if key and key not in contradicted]
    values, labels = np.unique([label for _, label in kept], return_inverse=True)
    texts = [text for text, _ in kept]
    if len(values) != 2 or np.bincount(labels).min() < FEWEST_OF_A_CLASS:
        return None
    if np.quantile([len(text) for text in texts], SHARE_AS_SHORT) > LONGEST_TEXT:
        return None
    return LabelledTexts(name, texts, labels, groups_of(texts))


def groups_of(texts: Sequence[str]) -> np.ndarray:
    """Group of each text: two are in one if they share their beginning, or a whole line or side of ' | ' or '[SEP]', of some
    length; and so are those that a third one joins."""
    leader = list(range(len(texts)))

    def leader_of(index: int) -> int:
        while leader[index] != index:
            leader[index] = index = leader[leader[index]]
        return index

    seen: dict[str, int] = {}
    for index, text in enumerate(texts):
        parts = (" ".join(part.casefold().split()) for part in [text[:_BEGINNING], *_BORDERS.split(text)])
        for part in parts:
            if len(part) >= _SHORTEST_PART:
                leader[leader_of(index)] = leader_of(seen.setdefault(part, index))
    return np.unique([leader_of(index) for index in range(len(texts))], return_inverse=True)[1]


def split(found: LabelledTexts, most: int, seed: int) -> tuple[LabelledTexts, LabelledTexts]:
    """Training and test prompts, at most `most` each, in random order; no group is in both."""
    rng = np.random.default_rng(seed)
    first, second = (
        rng.permutation(indices)[:most] for indices in held_out(found.labels, found.groups, 0.5, random_state=seed)
    )
    return found.part(first), found.part(second)
