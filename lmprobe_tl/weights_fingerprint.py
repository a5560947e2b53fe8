"""Which weights a model has, byte for byte."""

from __future__ import annotations

import hashlib
from typing import Any

from lmprobe_tl.store.record import tensor_bytes


def weights_sha256(model: Any) -> str:
    """SHA-256 of all parameters and buffers with their names, shapes and dtypes.

    A fine-tuned, quantised or edited model has another one. Reads every weight once: about a second for each gigabyte.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
