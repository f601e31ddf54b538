"""What only `--all` runs, as CI does: further architectures and targets of tests that have many."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from .codegen.kernels.emulation import EMULATED

MARK = "breadth"

SOME = frozenset(
    (
        *("llama", "qwen3", "mistral", "gemma3_text", "gemma4_text", "gpt2", "falcon"),
        *("mixtral", "gpt_oss", "deepseek_v3"),
    )
)
"""Architectures that between them have most of what passes and kernels tell apart: rotary and
learnt positions, windows, sinks, shared caches, one KV head, latent attention, norms of heads,
layer norms, biases, parallel blocks, tied tables, and experts of three kinds."""


def mark(items: list[pytest.Item]) -> None:
    """Mark tests of another architecture, or of an instruction set between the best that this
    machine has and the plainest."""
    # Only what tests imported: these modules import torch, which takes longer than most tests.
    configs = sys.modules.get(f"{__package__}.configs")
    harness = sys.modules.get(f"{__package__}.codegen.kernels.harness")
    others = configs.CONFIGS.keys() - SOME if configs is not None else set()
    inner = between(harness.RUNNABLE) if harness is not None else frozenset()
    for item in items:
        values = set(_values(item))
        if values & others or (values & inner and "kernels" in item.path.parts):
            item.add_marker(MARK)


def between(targets: tuple[str, ...]) -> frozenset[str]:
    """All but the first that is not emulated and the last."""
    native = [name for name in targets if name != EMULATED]
    return frozenset(targets) - {native[0], native[-1]} if native else frozenset()


def _values(item: pytest.Item) -> Iterator[str]:
    """The texts among a test's parameters, and the architecture of a `Build`."""
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec is not None else ():
        for part in value if isinstance(value, tuple) else (value,):
            text = getattr(part, "arch", part)
            if isinstance(text, str):
                yield text
