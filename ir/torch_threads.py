"""How many threads torch may use while a model is compiled: one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch computes on the calling thread alone within; the number of before is put back after.

    Torch's threads wait for each other at the end of every operation, and spin while they do. Where
    another program holds one of the processors, most of their time is such waiting: on two cores
    with one taken, compiling a model of 0.5 B parameters to int4 took twenty times the processor
    time that one thread takes.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
