"""A small function as a captured model: exported, converted and interpreted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from infc.frontend.capture import Capture
from infc.frontend.convert import convert_capture
from infc.frontend.skeleton import Skeleton
from infc.ir.interpret import interpret
from infc.ir.program import Program
from infc.ir.weights import checkpoint as checkpoint_leaf
from infc.ir.weights import program_weights

FEATURES = 8
ROWS = 32

Body = Callable[["Features", torch.Tensor], torch.Tensor]


class Features(torch.nn.Module):
    """Looks up `[1, T, 8]` features of the tokens and applies `body` to them."""

    def __init__(self, body: Body, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        table = torch.randn(ROWS, FEATURES, generator=generator).to(dtype)
        square = torch.randn(FEATURES, FEATURES, generator=generator).to(dtype)
        self.table = torch.nn.Parameter(table)
        self.square = torch.nn.Parameter(square)
        self.row = torch.nn.Parameter(square[0].clone())
        self.constant = torch.nn.Buffer(torch.linspace(-1, 1, FEATURES), persistent=False)
        self.scalar = torch.nn.Buffer(torch.tensor(1.5), persistent=False)
        self.body = body

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, logits_index: torch.Tensor
    ) -> torch.Tensor:
        x = torch.nn.functional.embedding(input_ids, self.table)
        return self.body(self, x)[:, logits_index]


class _Wrapper(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: torch.Tensor) -> Any:
        return self.model(*args)


def program_of(module: Features) -> Program:
    """The program of a `Features` module, its weights from the module itself."""
    tokens, rows = torch.export.Dim("T", min=1), torch.export.Dim("R", min=1)
    # Three tensors, not one twice: export takes equal objects for one input.
    lengths = ((1, 11), (1, 11), (7,))
    example = tuple(torch.zeros(length, dtype=torch.int64) for length in lengths)
    with torch.no_grad():
        exported = torch.export.export(
            _Wrapper(module),
            example,
            dynamic_shapes={"args": ({1: tokens}, {1: tokens}, {0: rows})},
            strict=False,
        )
    state = module.state_dict()
    buffers = {"constant": module.constant, "scalar": module.scalar}
    skeleton = Skeleton(module, FakeTensorMode(), buffers, {name: name for name in state})
    capture = Capture(exported, skeleton, None)
    program = convert_capture(capture, "body", lambda name, _: checkpoint_leaf(name))
    program.loaders["checkpoint"] = state.__getitem__  # type: ignore[index]
    return program


def both(body: Body, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """What the program of `body` gives for nine tokens, and what torch gives."""
    module = Features(body, dtype)
    program = program_of(module)
    ids = torch.arange(9) * 3
    index = torch.tensor([0, 4, 8])
    inputs = {"input_ids": ids, "positions": torch.arange(9), "logits_index": index}
    got = interpret(program, inputs, program_weights(program))[0]
    with torch.no_grad():
        expected = module(ids[None], torch.arange(9)[None], index)[0]
    return got, expected
