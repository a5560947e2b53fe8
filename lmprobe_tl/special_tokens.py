"""Token ids that a model gives a meaning of their own: which one begins a row, and which one ends it."""

from __future__ import annotations

from typing import Any

from lmprobe_tl.errors import InputError


def frame_ids(model: Any) -> tuple[int, int] | None:
    """The two tokens that an encoder's text stands between, [CLS] and [SEP] for BERT; None for a model that reads from left
    to right, or whose tokenizer has none."""
    tokenizer = getattr(model, "tokenizer", None)
    before, behind = getattr(tokenizer, "cls_token_id", None), getattr(tokenizer, "sep_token_id", None)
    # TransformerLens 3.9 calls BERT causal, though it knows that BERT generates nothing.
    generates = getattr(getattr(model, "adapter", None), "supports_generation", True)
    reads_one_way = generates and getattr(getattr(model, "cfg", None), "attention_dir", None) != "bidirectional"
    return None if reads_one_way or before is None or behind is None else (int(before), int(behind))


def bos_id(model: Any) -> int | None:
    """Token id of BOS, for an encoder of [CLS]; None for a model without a tokenizer or a tokenizer without BOS."""
    # TransformerLens gives BERT's tokenizer a BOS and an EOS that its vocabulary does not have: the id of [UNK].
    frame = frame_ids(model)
    return frame[0] if frame else getattr(getattr(model, "tokenizer", None), "bos_token_id", None)


def use_bos(model: Any, prepend_bos: bool | None) -> bool:
    """Whether text gets a leading BOS: as asked, else as the model's config says."""
    if prepend_bos is None:
        return bool(getattr(model.cfg, "default_prepend_bos", False)) and bos_id(model) is not None
    if prepend_bos and bos_id(model) is None:
        raise InputError("prepend_bos=True, but this model's tokenizer has no BOS token; pass prepend_bos=False or None.")
    return bool(prepend_bos)


def end_of_sequence_ids(model: Any) -> tuple[int, ...]:
    """Token ids that end a row: an encoder's [SEP]; else the config's, else the tokenizer's, which end a generated row."""
    frame = frame_ids(model)
    if frame:
        return (frame[1],)
    for owner in (model.cfg, getattr(model, "tokenizer", None)):
        found = getattr(owner, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()
