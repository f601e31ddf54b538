"""Caches of codes: what steps store is what the reference stores, and what they read of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infc.ir.interpret import interpret
from infc.ir.paged_state import PagedState
from infc.ir.program import Program
from infc.ir.resources import KvGroup, element_type
from infc.ir.row_codes import ROW_CODES
from infc.ir.targets import resolve_target
from infc.ir.torch_types import to_torch
from infc.ir.weights import program_weights

from ..harness import Chunk, make_step
from .emulating import Emulating
from .interpreting import Interpreting
from .running import Runner
from .test_attention import BLOCK, BLOCKS, VOCAB, attention

PLAIN = attention(4, 2, (20, 12), sinks=False)
"""Twelve elements of a key beside those that are turned; values of another size."""
ROUNDED = 6e-3
"""Of queries and of the weights of values, which are bfloat16: the codes are equal."""


def coded(dtype: str) -> Program:
    (group,) = PLAIN.resources
    assert isinstance(group, KvGroup)
    return replace(PLAIN, resources=(replace(group, dtype=dtype),))


@pytest.mark.parametrize("dtype", ROW_CODES)
def test_what_is_stored_and_read(dtype: str, interpreting: Interpreting) -> None:
    program = coded(dtype)
    runner = Runner(program, program_weights(program), interpreting, num_blocks=41)
    check_steps(program, runner)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_what_compiled_kernels_store_and_read(target: str, tmp_path: Path) -> None:
    """The same in the emulation."""
    program, machine = coded("e4m3"), resolve_target(target)
    process = Emulating(machine)
    runner = Runner(program, program_weights(program), process, num_blocks=41, target=machine)
    process.compile(runner.made.codes, tmp_path)
    check_steps(program, runner)


def check_steps(program: Program, runner: Runner) -> None:
    """A chunk, one behind it, and a token: what pages hold, and results within `ROUNDED`."""
    weights = program_weights(program)
    ids = np.random.default_rng(6).integers(0, VOCAB, 58)
    state = PagedState.allocate(program.resources, 41)
    for first, last in ((0, 37), (37, 57), (57, 58)):
        positions = torch.arange(first, last)
        state.set_step(
            *(positions, torch.tensor([0, last - first]), torch.tensor([last])),
            {"kv": torch.tensor([BLOCKS])},
        )
        inputs = {"input_ids": torch.tensor(ids[first:last]), "positions": positions}
        (wanted,) = interpret(program, inputs, weights, state)
        step = make_step(
            [Chunk(ids[first:last].tolist(), first, list(BLOCKS))], num_groups=1, block_size=BLOCK
        )
        found = runner.run(step).logits
        error = np.abs(found - wanted.numpy()).max() / wanted.abs().max()
        assert 0 < error < ROUNDED
        check_pages(program, runner, state, last)


def check_pages(program: Program, runner: Runner, state: PagedState, length: int) -> None:
    """Values to the last bit; keys as far as the rotation gives the same last bit."""
    (group,) = program.resources
    assert isinstance(group, KvGroup)
    pages = torch.from_numpy(runner.pages["kv"]).reshape(41, -1)
    kind, at = to_torch(element_type(group.dtype)), 0
    found = []
    for kept in (state.keys, state.values, state.key_scales, state.value_scales):
        held = kept[0].transpose(1, 2)
        num_bytes = held[0].numel() * held.element_size()
        part = pages[:, at : at + num_bytes].contiguous().view(held.dtype).reshape(held.shape)
        at += num_bytes
        places = [(BLOCKS[place // BLOCK], place % BLOCK) for place in range(length)]
        found.append([torch.stack([x[b, :, row] for b, row in places]) for x in (part, held)])
    assert at == group.bytes_per_block()
    keys, values, key_scales, value_scales = found
    assert keys[0].dtype == kind
    assert torch.equal(*values)
    assert torch.equal(*value_scales)
    torch.testing.assert_close(*key_scales, rtol=1e-6, atol=0)
    assert (keys[0] != keys[1]).float().mean() < 2e-3
