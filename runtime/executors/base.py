"""What runs a step: the one protocol of all backends, and what it is opened with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """How to open an executor. `num_blocks` has one entry a KV group, the null block included."""

    num_blocks: tuple[int, ...]
    num_threads: int = 1
    pin: bool = False


class Executor(Protocol):
    """Runs steps, and keeps the KV cache that they read and write."""

    def run(self, step: Step) -> NDArray[np.float32]:
        """Compute the step's tokens; the logits of the wanted rows, float32 `[R, vocab]`."""
        ...

    def close(self) -> None:
        """Give threads and memory back; a second call does nothing."""
        ...
