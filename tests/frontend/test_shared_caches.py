"""Layers that attend to what an earlier layer made: captured as such, and still traced once."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from infc.frontend.capture import capture_inline, capture_model
from infc.frontend.config import read_config
from infc.frontend.layers import NotRepeatableError, mark_layers
from infc.frontend.load import load_model
from infc.passes.base import PassContext
from infc.passes.cache_readers import cache_readers
from infc.passes.pipeline import STAGES

from ..checkpoints import make_checkpoint
from .oracle import no_log, parity_error
from .test_capture import converted

DEEP: dict[str, Any] = {
    "num_hidden_layers": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 8,
    "num_kv_shared_layers": 10,
}
SOURCES = {0: [0], 1: [1], 2: [2], 3: [3], 4: [4, 6, 8, 10, 12, 14], 5: [5, 7, 9, 11, 13, 15]}
"""By layer that has a cache: those that read it, of the model above."""


def test_layers_that_share_are_traced_once(tmp_path: Path) -> None:
    make_checkpoint("gemma4_text", tmp_path, **DEEP)
    config = read_config(tmp_path)
    lines: list[str] = []
    once = capture_model(config, torch.float32, 64, lines.append)
    assert lines == [] and once.stack is not None
    assert once.stack.templates[6:16] == [6, 7, 6, 7, 6, 7, 6, 7, 14, 15]
    inline = capture_inline(config, torch.float32, 64, no_log)
    left, right = converted(once), converted(inline)
    assert left.nodes == right.nodes
    assert left.weights == right.weights


def test_layers_that_share_read_the_same_two_values(tmp_path: Path) -> None:
    make_checkpoint("gemma4_text", tmp_path, **DEEP)
    program = load_model(tmp_path, log=no_log)
    assert parity_error(tmp_path, program) < 1e-5
    for one in STAGES["canonicalize"]:
        program = one.run(program, PassContext()).program
    readers = cache_readers(program)
    assert {
        nodes[0].attrs["layer"]: [n.attrs["layer"] for n in nodes] for nodes in readers
    } == SOURCES


class Layer(torch.nn.Module):
    """A layer that adds what it finds in a container, or leaves something there."""

    def __init__(self, leaves: bool) -> None:
        super().__init__()
        self.leaves = leaves

    def forward(self, x: torch.Tensor, kept: UserDict[str, torch.Tensor]) -> torch.Tensor:
        if self.leaves:
            kept["kv"] = x + 1
            return x
        return x + kept["kv"]


def run_layers(layers: list[Layer], replaced_before: int | None = None) -> None:
    """All of them in turn, marked; the container's content is replaced before one of them."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(layers)
    mark_layers(model, len(layers), repeat=True)
    with FakeTensorMode():
        x = torch.zeros(1, 3, 4)
        kept = UserDict({"kv": torch.zeros(1, 3, 4)})
        for index, layer in enumerate(layers):
            if index == replaced_before:
                kept["kv"] = torch.ones(1, 3, 4)
            x = layer(x, kept)


def test_equal_layers_may_read_what_was_handed_on() -> None:
    run_layers([Layer(leaves=False) for _ in range(6)])
    with pytest.raises(NotRepeatableError, match="called in different ways"):
        run_layers([Layer(leaves=False) for _ in range(6)], replaced_before=3)


def test_equal_layers_that_hand_on_are_traced_one_by_one() -> None:
    """Those that are not traced would leave nothing to the layers behind them."""
    with pytest.raises(NotRepeatableError, match="hands values on"):
        run_layers([Layer(leaves=True) for _ in range(6)])
