"""How many threads torch trains with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ELEMENTS_OF_ONE_THREAD = 2**24  # tokens of a step x features, 64 MiB: one thread goes through them in some 10 ms


@contextmanager
def training_threads(step_elements: int, device: torch.device) -> Iterator[None]:
    """One thread for training on the CPU by small steps; torch's own number is back afterwards, come what may.

    A small step is a row of short operations, and after each of them threads wait for one another: where other programs keep
    the processors busy, that takes longer than the work. One thread also gives the same sums on every machine.
    While it lasts, torch may use one thread in other threads of the program, too.
    """
    before = torch.get_num_threads()
    if before == 1 or device.type != "cpu" or step_elements > ELEMENTS_OF_ONE_THREAD:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
