"""Tokens that are drawn, and what is done to logits before: numpy's meaning, by the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from infc.ir.builder import ProgramBuilder
from infc.ir.program import Program
from infc.ir.resources import KvGroup
from infc.ir.types import DType, Sym, TensorType
from infc.runtime.sampling.adjustments import NO_IDS, Adjustment, adjusted_row, gather, packed
from infc.runtime.sampling.draws import GREEDY, Draw, draws_of
from infc.runtime.sampling.sampler import drawn_token
from infc.runtime.scheduling.step import NO_TOKEN, Step

from ..harness import Chunk, make_step
from .interpreting import Interpreting
from .running import Runner

Rows = NDArray[np.float32]
NO_BIAS = np.zeros(0, np.float32)


def rows_program(vocab: int, count: int) -> Program:
    """A program whose logits are rows of a table."""
    b = ProgramBuilder("rows", phase="planned")
    b.symbol("T", 1, 32)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    b.resources = (KvGroup("kv", (0,), 1, 16, 16, "bf16", 16),)
    rows = b.emit("embedding", b.weight("rows", TensorType(DType.F32, (count, vocab))), ids)
    b.output(logits=rows)
    program = b.build()
    return replace(program, spec=replace(program.spec, vocab_size=vocab, max_context=64))


def runner_of(rows: Rows, process: Interpreting) -> Runner:
    weights: Mapping[str, torch.Tensor] = {"rows": torch.from_numpy(rows)}
    program = rows_program(rows.shape[1], len(rows))
    return Runner(program, weights.__getitem__, process, num_blocks=4)


def step_of(count: int) -> Step:
    chunk = Chunk(list(range(count)), 0, [1, 2])
    step = make_step([chunk], num_groups=1, block_size=16)
    return replace(step, logits_rows=np.zeros(0, np.int32))


def some_rows(vocab: int) -> Rows:
    """Rows of several shapes: what is greatest lies anywhere, in one place, is equal."""
    rng = np.random.default_rng(vocab)
    rows = rng.standard_normal((10, vocab)).astype(np.float32)
    rows *= np.array([0.01, 1.0, 3.0, 10.0, 3.0] * 2, np.float32)[:, None]
    rows[4] = (rows[4] * 4).round() / 4
    rows[5] = 2.5
    rows[6] = -np.inf
    rows[6, rng.permutation(vocab)[:5]] = rng.standard_normal(5)
    rows[7] = -np.inf
    rows[7, [3, vocab - 1]] = 0.0, -0.0
    rows[8, vocab - 1] = np.nan
    rows[9, 1] = np.inf
    return rows


@pytest.mark.parametrize("vocab", [37, 5003])
def test_draws_are_those_of_numpy(vocab: int, interpreting: Interpreting) -> None:
    rows = some_rows(vocab)
    rng = np.random.default_rng(2)
    draws = [replace_row(GREEDY, row) for row in range(len(rows))]
    for place in range(16):
        draws.append(
            Draw(
                seed=int(rng.integers(2**64, dtype=np.uint64)),
                temperature=float(rng.choice([1e-40, 0.3, 1.0, 20.0])),
                top_p=float(rng.choice([1.0, 1e-310, 0.3, 0.8, 0.95, 0.9999])),
                min_p=float(rng.choice([0.0, 0.0, 0.05, 1.0])),
                top_k=int(rng.choice([0, 0, 1, 2, 3, 20, vocab])),
                row=place % len(rows),
                choice=int(rng.integers(3)),
                position=int(rng.integers(1000)),
            )
        )
    step = replace(step_of(len(rows)), draws=draws_of(draws))
    found = runner_of(rows, interpreting).run(step).tokens.tolist()
    wanted = [drawn_token(rows[one.row], one) for one in draws]
    assert found == [NO_TOKEN if token is None else token for token in wanted]
    assert NO_TOKEN in found


def replace_row(draw: Draw, row: int) -> Draw:
    return draw._replace(row=row)


def test_adjusted_logits_are_those_of_numpy(interpreting: Interpreting) -> None:
    vocab = 1003
    rng = np.random.default_rng(4)
    rows = (rng.standard_normal((6, vocab)) * 3).astype(np.float32)
    entries = [
        adjustment(rng, vocab, bias=300),
        adjustment(rng, vocab, counts=290),
        adjustment(rng, vocab, bias=5, counts=7, mask=True),
        adjustment(rng, vocab, mask=True),
    ]
    changes = gather([0, 2, 3, 5], entries)
    draws = [replace_row(GREEDY, row) for row in range(6)]
    step = replace(step_of(6), draws=draws_of(draws), adjustments=changes)
    runner = runner_of(rows, interpreting)
    found = runner.run(step).tokens.tolist()
    places = changes.places()
    plain = [int(row.argmax()) for row in rows]
    wanted = [
        int(adjusted_row(rows[d], changes, places[d]).argmax()) if d in places else plain[d]
        for d in range(6)
    ]
    assert found == wanted and found != plain


def adjustment(
    rng: np.random.Generator, vocab: int, *, bias: int = 0, counts: int = 0, mask: bool = False
) -> Adjustment:
    allowed = packed(rng.random(vocab) < 0.3) if mask else None
    return Adjustment(
        *(1.3, 0.7, 0.4),
        rng.permutation(vocab)[:bias].astype(np.int32),
        (rng.standard_normal(bias) * 20).astype(np.float32),
        rng.permutation(vocab)[:counts].astype(np.int32),
        rng.integers(0, 4, counts).astype(np.int32),
        allowed,
    )


@pytest.mark.parametrize("counted", [False, True])
def test_a_carried_token_is_resolved_and_counted(counted: bool, interpreting: Interpreting) -> None:
    """It is the last of its sequence, so it counts for penalties of the token behind it."""
    rows = np.zeros((5, 40), np.float32)
    rows[3, [3, 7]] = 5.0, 4.9
    ids = np.array([3], np.int32) if counted else NO_IDS
    entry = Adjustment(1.0, 0.5, 0.0, NO_IDS, NO_BIAS, ids, np.zeros(len(ids), np.int32), None)
    step = step_of(2)
    step = replace(
        step,
        token_ids=np.array([1, 0], np.int32),
        carried=np.array([[1, 2], [-1, 0]], np.int32),
        draws=draws_of([replace_row(GREEDY, 0), replace_row(GREEDY, 1)]),
        adjustments=gather([1], [entry]),
    )
    runner = runner_of(rows, interpreting)
    runner.tokens_before = np.array([4, 4, 3], np.int32)
    assert runner.run(step).tokens.tolist() == [0, 7]
    runner.tokens_before = np.array([4, 4, NO_TOKEN], np.int32)
    assert runner.run(step).tokens.tolist() == [0, 1]


def test_nan_and_infinity_show_behind_a_mask(interpreting: Interpreting) -> None:
    rows = np.zeros((3, 50), np.float32)
    rows[0, 9], rows[1, 9] = np.nan, np.inf
    allowed = np.ones(50, np.bool_)
    allowed[[0, 9]] = False
    entry = Adjustment(1.0, 0.0, 0.0, NO_IDS, NO_BIAS, NO_IDS, NO_IDS, packed(allowed))
    draws = draws_of([replace_row(GREEDY, row) for row in range(3)])
    step = replace(step_of(3), draws=draws, adjustments=gather([0, 1, 2], [entry] * 3))
    found = runner_of(rows, interpreting).run(step).tokens.tolist()
    assert found == [NO_TOKEN, NO_TOKEN, 1]


def test_blocks_are_copied_whole(interpreting: Interpreting) -> None:
    runner = runner_of(np.zeros((2, 20), np.float32), interpreting)
    rng = np.random.default_rng(0)
    runner.pages["kv"] = rng.integers(0, 256, len(runner.pages["kv"])).astype(np.uint8)
    before = runner.pages["kv"].reshape(4, -1).copy()
    pairs = np.array([[2, 3], [0, 0]], np.int32)
    runner.run(replace(step_of(2), block_copies=(pairs,)))
    assert np.array_equal(runner.pages["kv"].reshape(4, -1), before[[0, 1, 2, 2]])
