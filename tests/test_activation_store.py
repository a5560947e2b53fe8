"""Activation stores against plain extraction: the same values, refused when they are of something else, no text inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import N_LAYERS, Tiny
from embedded import embedded_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmprobe_tl import ActivationStore, extract_activations, extract_to_store
from lmprobe_tl.errors import EmptyMaskError, InputError, PromptTooLongError, StoreError
from lmprobe_tl.hook_points import load_model
from lmprobe_tl.store.writing import _default_prompts_per_shard
from lmprobe_tl.tokens import row_digest
from lmprobe_tl.weights_fingerprint import weights_sha256

BOS, EOS = 0, 1
POSTS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS))
POOLINGS = ["last_token", "first_token", "mean", "max", "min", "eos", "all"]
ROWS = [
    [BOS, 5, 77, EOS, 140, 9, 30],
    [EOS],
    [2, 41, EOS, 2, 2],
    [BOS, *range(60, 80), EOS],
    [12, EOS, EOS, 200, BOS, EOS, 33, 34, 35],
    [2, 41, EOS, 2, 2],
    [BOS, BOS, EOS, 3],
    [300, 301, 302, 303, EOS],
]
PROMPTS = [torch.tensor(row) for row in ROWS]
QUIET: dict[str, Any] = {"prompts_per_shard": 3, "progress": False}
TEXTS = ["the model reads", "a short line", "cats dogs rain sun", "music and light", "every word"]


def store_of(tiny: Tiny, path: Path, *arguments: Any, prompts: Any = PROMPTS, **options: Any) -> ActivationStore:
    return extract_to_store(tiny.bridge, prompts, path, *arguments, **{**QUIET, **options})


def as_one_run(tiny: Tiny, poolings: list[str], **options: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Pooling -> hook name -> what extract_activations gives for each shard's prompts, one after the other."""
    parts = [
        extract_activations(tiny.bridge, PROMPTS[start : start + 3], "all", pooling=poolings, progress=False, **options)
        for start in range(0, len(PROMPTS), 3)
    ]
    return {
        pooling: {name: torch.cat([part[pooling].values[name] for part in parts]) for name in POSTS} for pooling in poolings
    }


# --- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_those_of_plain_extraction(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    store = store_of(tiny, tmp_path, "all", POOLINGS, dtype=dtype)
    rounded = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    assert (store.hook_points, store.poolings, store.n_prompts) == (POSTS, tuple(POOLINGS), len(ROWS))
    assert store.missing_shards == []
    expected = as_one_run(tiny, POOLINGS)
    whole = extract_activations(tiny.bridge, PROMPTS, "all", pooling=POOLINGS, progress=False)  # in batches of its own
    for pooling in POOLINGS:
        for layer, name in enumerate(POSTS):
            found = store.values(layer, pooling)
            assert found.dtype == torch.float32
            assert torch.equal(found, expected[pooling][name].to(rounded).float())
        close = whole[pooling].concatenated()
        torch.testing.assert_close(store.values(None, pooling), close, rtol=torch.finfo(rounded).eps, atol=1e-4)
    lengths = [len(row) - (row[0] == BOS) for row in ROWS]
    assert store.lengths().tolist() == lengths
    assert store.n_tokens == sum(lengths)
    assert [bytes(one) for one in store.digests()] == [row_digest(row) for row in ROWS]
    store.verify()


def test_bos_and_batching_are_those_asked_for(llama: Tiny, tmp_path: Path) -> None:
    options = {"include_bos": True, "max_tokens_per_batch": 20, "batch_size": 2}
    store = store_of(llama, tmp_path, "all", ["mean", "all"], **options)
    for pooling, expected in as_one_run(llama, ["mean", "all"], **options).items():
        assert torch.equal(store.values(3, pooling), expected[POSTS[3]])
    assert store.lengths().tolist() == [len(row) for row in ROWS]


def test_any_hook_point_of_any_width_is_stored(gpt2: Tiny, tmp_path: Path) -> None:
    names = ["blocks.1.mlp.hook_pre", "blocks.2.hook_resid_post"]
    store = store_of(gpt2, tmp_path, names, "mean")
    for name in names:
        expected = extract_activations(gpt2.bridge, PROMPTS, name, "mean", progress=False).values[name]
        torch.testing.assert_close(store.values(name), expected, rtol=1e-4, atol=1e-4)
    assert store.values().shape[1] == sum(store.values(name).shape[1] for name in names)
    assert store.values(names[0]).shape[1] != store.values(names[1]).shape[1]


def test_a_real_tokenizers_text_is_stored_as_it_is_extracted(tmp_path: Path) -> None:
    model, texts = embedded_model(), ["# A comment.\n", "x = load(path)\n", "for item in items:\n", "import os\n"]
    store = extract_to_store(model, texts, tmp_path, 3, ["mean", "all"], keep_tokens=True, progress=False)
    for pooling in ("mean", "all"):
        found = extract_activations(model, texts, 3, pooling, progress=False)
        assert torch.equal(store.values(pooling=pooling), found.concatenated())
        assert store.tokens() == found.tokens


@pytest.mark.parametrize("keep_tokens", [True, False])
def test_prompts_of_any_kind_of_sequence(llama: Tiny, tmp_path: Path, keep_tokens: bool) -> None:
    class Lazy:
        asked: list[int] = []  # noqa: RUF012

        def __len__(self) -> int:
            return len(TEXTS)

        def __getitem__(self, index: int) -> str:
            self.asked.append(index)
            return TEXTS[index]

    expected = store_of(llama, tmp_path / "list", 2, prompts=TEXTS, keep_tokens=keep_tokens).values()
    for number, prompts in enumerate([tuple(TEXTS), np.array(TEXTS), np.array(TEXTS, dtype=object), Lazy()]):
        assert torch.equal(store_of(llama, tmp_path / str(number), 2, prompts=prompts).values(), expected)
    # Each twice, in order: when its shard is computed, and for the digest of the whole list.
    assert sorted(Lazy.asked) == sorted([*range(len(TEXTS))] * 2)


# --- reading -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(all_tiny: dict[str, Tiny], tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("stores") / "store"
    return store_of(all_tiny["llama"], folder, [3, 1], ["mean", "all"], keep_tokens=True)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    max_rows=st.none() | st.integers(1, 40),
    pooling=st.sampled_from(["mean", "all"]),
    hook_points=st.sampled_from([None, 1, [1], [1, 3], -1, [-3, POSTS[3]]]),
)
def test_chunks_of_any_size_are_the_values(
    store: ActivationStore, max_rows: int | None, pooling: str, hook_points: Any
) -> None:
    chunks = list(store.chunks(hook_points, pooling, max_rows=max_rows))
    assert all(1 <= len(chunk.values) <= (max_rows or 1000) and len(chunk.prompts) == len(chunk.values) for chunk in chunks)
    assert torch.equal(torch.cat([chunk.values for chunk in chunks]), store.values(hook_points, pooling))
    counts = store.lengths() if pooling == "all" else np.ones(store.n_prompts, dtype=int)
    owners = np.concatenate([chunk.prompts for chunk in chunks])
    assert owners.tolist() == np.repeat(np.arange(store.n_prompts), counts).tolist()


def test_chunks_read_one_shard_at_a_time(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    tensor_of = ActivationStore._tensor

    def noted(self: ActivationStore, shard: int, name: str) -> torch.Tensor:
        read.append(shard)
        return tensor_of(self, shard, name)

    monkeypatch.setattr(ActivationStore, "_tensor", noted)
    for shard, _ in enumerate(store.chunks(1, "mean")):
        assert read == list(range(shard + 1))


def test_what_is_read_can_be_written_to_without_harm(store: ActivationStore) -> None:
    before = store.values(1, "mean")
    for chunk in store.chunks(1, "mean"):
        chunk.values.zero_()
    assert torch.equal(store.values(1, "mean"), before)
    assert before.abs().max() > 0


@pytest.mark.parametrize(
    ("hook_points", "names"),
    [
        (None, [POSTS[3], POSTS[1]]),
        (1, [POSTS[1]]),
        (-1, [POSTS[3]]),
        ([-3, 3], [POSTS[1], POSTS[3]]),
        (POSTS[3], [POSTS[3]]),
        ((POSTS[1], -1), [POSTS[1], POSTS[3]]),
        (np.int64(1), [POSTS[1]]),
        (np.array([3, 1]), [POSTS[3], POSTS[1]]),
        ([torch.tensor(1)], [POSTS[1]]),
        (range(1, 4, 2), [POSTS[1], POSTS[3]]),
    ],
)
def test_hook_points_by_layer_and_name(store: ActivationStore, hook_points: Any, names: list[str]) -> None:
    assert store.hook_names(hook_points) == names
    expected = torch.cat([store.values(name, "mean") for name in names], dim=1)
    assert torch.equal(store.values(hook_points, "mean"), expected)


@pytest.mark.parametrize(
    ("hook_points", "message"),
    [
        (0, r"no hook point 'blocks\.0\.hook_resid_post'; it has blocks\.3\.hook_resid_post, blocks\.1"),
        (4, "no hook point 'blocks.4"),
        (-5, "no hook point 'blocks.-5"),
        ("blocks.1.hook_resid_pots", "no hook point 'blocks.1.hook_resid_pots'; it has"),
        ([1, "hook_embed"], "no hook point 'hook_embed'"),
        ([], "no hook point in an empty list"),
        (1.5, r"1\.5 is no hook point; expected a layer \(int\)"),
        (True, "True is no hook point"),
        ([None], "None is no hook point"),
        ({"a": 1}, "is no hook point"),
    ],
)
def test_hook_points_that_the_store_lacks_are_refused(store: ActivationStore, hook_points: Any, message: str) -> None:
    for read in (store.values, store.hook_names, lambda *one: list(store.chunks(*one))):
        with pytest.raises(InputError, match=message):
            read(hook_points, *(() if read == store.hook_names else ("mean",)))


@pytest.mark.parametrize("pooling", [None, "max", "score:mean", 3])
def test_a_pooling_that_the_store_lacks_is_refused(store: ActivationStore, pooling: Any) -> None:
    with pytest.raises(InputError, match=f"pooling is {pooling!r}; this store has mean, all"):
        store.values(1, pooling)


@pytest.mark.parametrize("max_rows", [0, -3, 2.0, "5", True])
def test_a_chunk_size_that_cannot_be_is_refused(store: ActivationStore, max_rows: Any) -> None:
    with pytest.raises(InputError, match=f"max_rows is {max_rows!r}; expected None"):
        list(store.chunks(1, "mean", max_rows=max_rows))


# --- tokens and text ---------------------------------------------------------------------------------------------------


def traces(folder: Path, rows: list[list[int]], texts: list[str]) -> list[str]:
    """Files that hold three token ids in a row, in any usual width, or three words of text."""
    needles = [np.array(row[-3:], dtype=kind).tobytes() for row in rows for kind in ("<i2", "<i4", "<i8")]
    needles += [json.dumps(row[-3:]).strip("[]").replace(" ", space).encode() for row in rows for space in ("", " ")]
    needles += [text.encode() for text in texts]
    return [path.name for path in sorted(folder.iterdir()) if any(needle in path.read_bytes() for needle in needles)]


def test_a_store_holds_no_text_unless_it_is_asked_to(llama: Tiny, tmp_path: Path) -> None:
    rows = [llama.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert min(map(len, rows)) >= 3
    for keep in (False, True):
        store = store_of(llama, tmp_path / str(keep), "all", POOLINGS[:3], prompts=TEXTS, keep_tokens=keep)
        assert store.manifest.keeps_tokens is keep
    assert traces(tmp_path / "False", rows, TEXTS) == []
    assert traces(tmp_path / "True", rows, TEXTS) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert ActivationStore(tmp_path / "True").tokens() == [[BOS, *row] for row in rows]
    with pytest.raises(InputError, match="does not hold the token ids; extract with keep_tokens=True"):
        ActivationStore(tmp_path / "False").tokens()


# --- another extraction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"dtype": "bfloat16"}, 'dtype: "bfloat16", not "float32"'),
        ({"hook_points": [1, 2]}, r'hook_points: with \["blocks\.2\.hook_resid_post"\] and without \["blocks\.3'),
        ({"hook_points": [3, 1]}, "hook_points: "),
        ({"pooling": ["mean", "max"]}, r'poolings: with \["max"\]\.'),
        ({"include_bos": True}, "include_bos: true, not false"),
        ({"prompts": PROMPTS[:-1]}, "n_prompts: 7, not 8"),
        ({"prompts": [*PROMPTS, PROMPTS[0]]}, "n_prompts: 9, not 8"),
        ({"max_length": 30}, "max_length: 30, not null"),
        ({"truncation": "left"}, 'truncation: "left", not null'),
        ({"max_tokens_per_batch": 100}, "max_tokens_per_batch: 100, not 1024"),
        ({"batch_size": 8}, "batch_size: 8, not null"),
        ({"prompts_per_shard": 4}, "prompts_per_shard: 4, not 3"),
        ({"keep_tokens": True}, "keeps_tokens: true, not false"),
        ({"prepend_bos": False}, r"tokenizer\.prepend_bos: false, not true"),
    ],
    ids=str,
)
@pytest.mark.parametrize("complete", [True, False])
def test_a_store_of_another_extraction_is_refused(
    llama: Tiny, tmp_path: Path, changed: dict[str, Any], difference: str, complete: bool
) -> None:
    asked: dict[str, Any] = {"hook_points": [1, 3], "pooling": ["mean"]}
    store_of(llama, tmp_path, **asked, shard=None if complete else (1, 3))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StoreError, match=f"holds another extraction; wanted is {difference}"):
        store_of(llama, tmp_path, **{**asked, **changed})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    store_of(llama, tmp_path, **asked).verify()  # the control: nothing changed


@pytest.mark.parametrize(
    "prompts",
    [
        [*PROMPTS[:4], torch.tensor([12, 13]), *PROMPTS[5:]],
        [*PROMPTS[:3], PROMPTS[4], PROMPTS[3], *PROMPTS[5:]],
        [*PROMPTS[:2], *PROMPTS[3:], PROMPTS[2]],
    ],
    ids=["changed", "reordered", "moved"],
)
def test_other_prompts_are_refused(llama: Tiny, tmp_path: Path, prompts: list[torch.Tensor]) -> None:
    store_of(llama, tmp_path, 1)
    with pytest.raises(StoreError, match=r"shard-0000\d.* holds other prompts: .* prompts \d to \d"):
        store_of(llama, tmp_path, 1, prompts=prompts)


def test_a_worker_with_other_prompts_is_found_when_the_store_is_completed(llama: Tiny, tmp_path: Path) -> None:
    store_of(llama, tmp_path, 1, shard=(0, 2))
    other = [torch.tensor([4, 5]), *PROMPTS[1:]]
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors' holds other prompts: .* prompts 0 to 2"):
        store_of(llama, tmp_path, 1, prompts=other, shard=(1, 2))
    assert not (tmp_path / "index.json").exists()


def test_one_changed_weight_is_another_model(tiny: Tiny, tmp_path: Path) -> None:
    model = load_model(tiny.folder)
    assert weights_sha256(model) == weights_sha256(tiny.bridge)
    extract_to_store(model, PROMPTS, tmp_path, 1, **QUIET)
    original = weights_sha256(model)
    inner = list(model.original_model.parameters()) + list(model.original_model.buffers())
    for tensor in inner:
        last = tensor.data[(-1,) * tensor.ndim]  # a view of one element
        kept = last.clone()
        last.copy_(last + 1 if tensor.is_floating_point() else ~last)
        assert weights_sha256(model) != original
        last.copy_(kept)
    assert weights_sha256(model) == original
    extract_to_store(model, PROMPTS, tmp_path, 1, **QUIET)
    inner[0].data[2, 3] += 1e-3
    with pytest.raises(StoreError, match="wanted is weights_sha256: "):
        extract_to_store(model, PROMPTS, tmp_path, 1, **QUIET)


def test_processed_or_rounded_weights_are_another_model(gpt2: Tiny, tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    store_of(gpt2, tmp_path, 1)
    processed = load_model(gpt2.folder)
    processed.enable_compatibility_mode()
    rounded = TransformerBridge.boot_transformers(str(gpt2.folder), device="cpu", dtype=torch.bfloat16)
    for model in (processed, rounded):
        with pytest.raises(StoreError, match="weights_sha256: "):
            extract_to_store(model, PROMPTS, tmp_path, 1, **QUIET)


def test_another_vocabulary_is_refused(gpt2: Tiny, tmp_path: Path) -> None:
    model = load_model(gpt2.folder)
    extract_to_store(model, PROMPTS, tmp_path, 1, **QUIET)
    model.tokenizer.add_tokens(["<new>"])
    with pytest.raises(StoreError, match=r'tokenizer\.fingerprint: "[0-9a-f]{16}", not "[0-9a-f]{16}"\.'):
        extract_to_store(model, PROMPTS, tmp_path, 1, **QUIET)


def test_other_versions_of_software_go_on(llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprobe_tl.store import writing

    began = store_of(llama, tmp_path, 1, shard=(0, 2)).manifest.versions
    monkeypatch.setattr(writing, "package_versions", lambda: {"torch": "9.9"})
    store = store_of(llama, tmp_path, 1)
    store.verify()
    assert store.manifest.versions == began != {"torch": "9.9"}


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_path_that_is_taken_is_refused(llama: Tiny, tmp_path: Path, what: str) -> None:
    path = tmp_path / "taken"
    if what == "folder":
        path.mkdir()
    (path if what == "file" else path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="taken' exists and is no activation store; choose a new or an empty folder"):
        store_of(llama, path, 1)
    assert (path if what == "file" else path / "notes.txt").read_text() == "mine"


# --- what cannot be stored ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pooling": lambda activations, mask: activations[:, 0]}, "is a function, and a store cannot tell"),
        ({"pooling": "score:mean"}, "reduces scores"),
        ({"pooling": []}, "pooling is an empty list"),
        ({"pooling": ["mean", "activation:mean"]}, "names 'mean' more than once"),
        ({"dtype": "float64"}, "dtype is 'float64'; expected 'float32', 'float16', 'bfloat16'"),
        ({"dtype": torch.float16}, r"dtype is torch\.float16"),
        ({"shard": (3, 3)}, r"shard is \(3, 3\); expected \(i, n\)"),
        ({"shard": (-1, 3)}, "shard is"),
        ({"shard": (True, 3)}, "shard is"),
        ({"shard": "0/3"}, "shard is '0/3'"),
        ({"prompts": iter(TEXTS)}, "a store needs a sequence"),
        ({"prompts": "one text"}, "prompts is one string"),
        ({"prompts": {"a": 1}}, "prompts is a dict"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": torch.ones(3, 4, dtype=torch.long)}, r"prompts is one array of shape \(3, 4\)"),
        ({"prompts": torch.arange(4)}, "prompts is one 1-D array"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch is 0"),
        ({"max_length": 97}, "max_length is 97"),
        ({"truncation": "both"}, "truncation is 'both'"),
        ({"prompts_per_shard": 0}, "prompts_per_shard is 0; expected at least 1"),
        ({"include_bos": 1}, "include_bos is 1"),
        ({"hook_points": 9}, "layer 9 does not exist"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    llama: Tiny, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        store_of(llama, tmp_path / "store", **{"hook_points": 1, **changed})
    assert not (tmp_path / "store").exists()


def test_hooks_of_the_user_are_refused(llama: Tiny, tmp_path: Path) -> None:
    llama.bridge.hook_dict[POSTS[1]].add_hook(lambda values, hook: values + 1)
    try:
        with pytest.raises(InputError, match=r"hooks of others on 'blocks\.1\.hook_\w+', which may change activations"):
            store_of(llama, tmp_path / "store", 1)
    finally:
        llama.bridge.reset_hooks()
    assert not (tmp_path / "store").exists()


def with_one(index: int, prompt: Any) -> list[Any]:
    return [*PROMPTS[:index], prompt, *PROMPTS[index + 1 :]]


@pytest.mark.parametrize("index", [1, 4, 7])  # in the first shard and in later ones
@pytest.mark.parametrize(
    ("prompt", "pooling", "error", "message"),
    [
        (torch.arange(97) + 3, "mean", PromptTooLongError, r"prompt {} \(97 tokens\)"),
        (torch.tensor([BOS]), "mean", EmptyMaskError, "no token counts in prompt {};"),
        (torch.tensor([3, 999]), "mean", InputError, r"prompts\[{}\] holds token id 999"),
        (None, "mean", InputError, r"prompts\[{}\] is a NoneType"),
        ({"role": "user", "content": "a"}, "mean", InputError, r"prompts\[{}\] is a single chat message"),
        (torch.tensor([5, 6]), "eos", InputError, "no token of prompt {} is EOS"),
    ],
)
def test_prompts_are_named_by_their_place_in_the_whole_list(
    llama: Tiny, tmp_path: Path, index: int, prompt: Any, pooling: str, error: type[InputError], message: str
) -> None:
    with pytest.raises(error, match=message.format(index)) as caught:
        store_of(llama, tmp_path, 1, pooling, prompts=with_one(index, prompt))
    if error is not InputError:
        assert caught.value.rows == [index]
    assert not (tmp_path / f"shard-{index // 3:05d}.safetensors").exists()
    assert len(list(tmp_path.glob("shard-*"))) == index // 3  # the shards before it are kept


@pytest.fixture(scope="module")
def loud(all_tiny: dict[str, Tiny]) -> Any:
    """A model that gives token 250 one huge number."""
    model = load_model(all_tiny["llama"].folder)
    model.original_model.model.embed_tokens.weight.data[250, 3] = 1e5
    return model


@pytest.mark.parametrize("pooling", ["mean", "all", "last_token"])
def test_what_float16_cannot_hold_is_named(loud: Any, tmp_path: Path, pooling: str) -> None:
    prompts = [*with_one(4, torch.tensor([7, 8, 250])), torch.tensor([250])]
    options: dict[str, Any] = {"hook_points": ["hook_embed", 1], "pooling": pooling, **QUIET}
    message = (
        r"prompt 4 has an activation of \S+ at 'hook_embed', more than float16 can hold \(65504\); use dtype='bfloat16'"
    )
    if pooling == "mean":
        prompts[4] = torch.tensor([250])
    with pytest.raises(InputError, match=message) as caught:
        extract_to_store(loud, prompts, tmp_path / "store", dtype="float16", **options)
    assert "activation of 100000 at" in str(caught.value)
    assert [path.name for path in (tmp_path / "store").glob("*shard*")] == ["shard-00000.safetensors"]
    for dtype in ("bfloat16", "float32"):
        store = extract_to_store(loud, prompts, tmp_path / dtype, dtype=dtype, **options)
        assert store.values("hook_embed").max() == torch.tensor(1e5).to(getattr(torch, dtype)).float()


def test_activations_that_are_not_finite_are_named(all_tiny: dict[str, Tiny], tmp_path: Path) -> None:
    model = load_model(all_tiny["llama"].folder)
    model.original_model.model.embed_tokens.weight.data[250, 3] = torch.nan
    prompts = [*with_one(7, torch.tensor([5, 250])), torch.tensor([9])]
    with pytest.raises(InputError, match="prompt 7 has an activation at 'hook_embed' that is NaN or infinite"):
        extract_to_store(model, prompts, tmp_path, "hook_embed", "mean", **QUIET)
    assert len(list(tmp_path.glob("shard-*"))) == 2


# --- shards ------------------------------------------------------------------------------------------------------------


def test_the_default_shard_size_goes_by_bytes(llama: Tiny) -> None:
    def default(
        n_prompts: int, n_hook_points: int, poolings: list[str], dtype: str, n_workers: int = 1, budget: int = 1024
    ) -> int:
        prompts = [torch.arange(3, 53)] * n_prompts
        return _default_prompts_per_shard(
            llama.bridge, prompts, n_hook_points, poolings, dtype, n_workers, False, budget, {}
        )

    assert default(10**5, 1, ["mean"], "float32") == 1024
    assert default(10**5, 2, ["mean", "all"], "float32") == 2 * 2**20 // (51 * 2 * 32 * 4)
    assert default(10**5, 2, ["mean", "all"], "bfloat16") == 2 * 2**20 // (51 * 2 * 32 * 2)
    assert default(10**5, 10**4, ["all"], "float32") == 128
    assert default(10**5, 10**4, ["all"], "float32", budget=8192) == 4 * 8192 // 50  # four batches
    assert default(100, 1, ["mean"], "float32") == 100
    assert default(100, 1, ["mean"], "float32", n_workers=8) == 13


def test_a_store_goes_on_with_the_shard_size_that_it_began_with(llama: Tiny, tmp_path: Path) -> None:
    store_of(llama, tmp_path, 1, prompts_per_shard=2, shard=(0, 2))
    store = store_of(llama, tmp_path, 1, prompts_per_shard=None)
    assert store.manifest.prompts_per_shard == 2
    assert [record.n_prompts for record in store.records] == [2, 2, 2, 2]


def test_a_store_of_more_shards_than_a_folder_can_bear_is_refused(llama: Tiny, tmp_path: Path) -> None:
    class Endless(list[torch.Tensor]):
        def __len__(self) -> int:
            return 10**9

    with pytest.raises(InputError, match=r"prompts_per_shard is 999; expected at least 1000, for at most 1,000,000 shards"):
        store_of(llama, tmp_path / "store", 1, prompts=Endless(), prompts_per_shard=999)
    assert not (tmp_path / "store").exists()
