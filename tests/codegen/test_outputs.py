"""What leaves a step: the tokens drawn from its rows, and the rows of logits that are wanted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from infc.ir.builder import ProgramBuilder
from infc.ir.program import Program
from infc.ir.targets import resolve_target
from infc.ir.types import DType, Sym, TensorType
from infc.runtime.executors.base import head_output, run_step
from infc.runtime.sampling.adjustments import Adjustment, adjusted_row, gather, packed
from infc.runtime.sampling.draws import DRAW, Draw
from infc.runtime.sampling.sampler import support, uniform
from infc.runtime.scheduling.step import Step

from .harness import Chunk, build, make_step, open_cpp, with_weights

pytestmark = pytest.mark.usefixtures("as_shipped")

WIDTH = 75
TARGETS = ("native", "x86-64-v2")
DTYPES = {DType.F32: torch.float32, DType.BF16: torch.bfloat16}


def program(table: torch.Tensor, dtype: DType) -> Program:
    """A program whose logits are the rows of `table` that the token ids name."""
    b = ProgramBuilder("rows", phase="planned")
    b.symbol("T", 1, 64)
    b.symbol("R", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    index = b.input("logits_index", TensorType(DType.I64, (Sym("R"),)))
    weight = b.weight("table", TensorType(dtype, tuple(table.shape)))
    b.outputs = [b.emit("take", b.emit("embedding", weight, ids), index, dim=0)]
    made = b.build()
    made = replace(made, spec=replace(made.spec, vocab_size=table.shape[1]))
    return with_weights(made, {"table": table})


def rows_of(kind: torch.dtype) -> torch.Tensor:
    """Rows with equals, NaN, infinities of both signs, and a greatest at every place."""
    table = torch.randn(WIDTH + 8, WIDTH, generator=torch.Generator().manual_seed(0))
    table[range(WIDTH), range(WIDTH)] = 9.0
    table[WIDTH] = 1.0
    table[WIDTH + 1, [3, 40, 74]] = 8.0
    table[WIDTH + 2, [74, 19]] = 8.0
    table[WIDTH + 3, 70] = torch.nan
    table[WIDTH + 4, 5] = torch.inf
    table[WIDTH + 5] = -torch.inf
    table[WIDTH + 6] = -torch.inf
    table[WIDTH + 6, 33] = -3.0
    table[WIDTH + 7] = -table[WIDTH + 7].abs()
    return table.to(kind)


def asking(step: Step, rows: list[int] | None, draws: list[Draw]) -> Step:
    """The step with these draws, and logits wanted of `rows`."""
    wanted = None if rows is None else np.array(rows, np.int32)
    return replace(step, draws=np.array(draws, DRAW), logits_rows=wanted)


def rows_step(ids: list[int]) -> Step:
    """A step with a row for each of four sequences' tokens."""
    plain = make_step([Chunk(ids, 0, [1] * 4)], num_groups=0, block_size=16)
    return replace(plain, logits_index=np.arange(len(ids), dtype=np.int32))


def greedy(row: int) -> Draw:
    return Draw(0, 0.0, 1.0, 0.0, 0, row, 0, 0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.value)
def test_greatest_and_wanted_rows(
    dtype: DType, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infc.ir.weights.require_finite", lambda *_: None)  # NaN is wanted here
    table = rows_of(DTYPES[dtype])
    artifact = build(program(table, dtype), tmp_path / "a", resolve_target(target))
    values: NDArray[np.float32] = table.float().numpy()
    for threads in (1, 2):
        executor = open_cpp(artifact, num_threads=threads)
        for first in (0, WIDTH + 8 - 64):
            ids = list(range(first, first + 64))
            for rows in (None, [], [0, 5, 63]):
                draws = [greedy(row) for row in (5, *range(64))]
                step = asking(rows_step(ids), rows, draws)
                expected = head_output(step, values[ids], None)
                output = run_step(executor, step)
                np.testing.assert_array_equal(output.logits, expected.logits)
                assert output.tokens.tolist() == expected.tokens.tolist()


LONG = 2999


def long_rows(kind: torch.dtype) -> torch.Tensor:
    """Rows of several shapes: peaked, flat, all equal, with many equals, forbidden, negative."""
    table = torch.randn(16, LONG, generator=torch.Generator().manual_seed(1))
    table *= torch.tensor([0.01, 1.0, 3.0, 10.0] * 4)[:, None]
    table[4] = 2.5
    table[5] = table[5].round()
    table[6, ::2] = -torch.inf
    table[7] = -torch.inf
    table[7, [17, 2998]] = 0.0
    table[8] = -table[8].abs() - 100
    table[9, 5] = torch.nan
    table[10, :1500] = 1.0
    return table.to(kind)


def random_draws(rng: np.random.Generator, count: int) -> list[Draw]:
    return [
        Draw(
            seed=int(rng.integers(2**64, dtype=np.uint64)),
            temperature=float(rng.choice([0.0, 1e-40, 0.3, 1.0, 20.0])),
            top_p=float(rng.choice([1.0, 1e-310, 1e-9, 0.5, 0.95, 0.9999])),
            min_p=float(rng.choice([0.0, 0.0, 0.05, 1.0])),
            top_k=int(rng.choice([0, 1, 40, 700, LONG, 100_000])),
            row=int(rng.integers(16)),
            choice=int(rng.integers(3)),
            position=int(rng.integers(100_000)),
        )
        for _ in range(count)
    ]


def is_possible(row: NDArray[np.float32], draw: Draw, token: int) -> bool:
    """Whether shares that differ from numpy's in the last bits could lead to this token."""
    for slack in (0.0, 1e-5, -1e-5):
        kept = support(row, draw._replace(top_p=min(1.0, max(1e-9, draw.top_p + slack))))
        ids = np.arange(len(row)) if kept is None else kept
        wide = row[ids].astype(np.float64)
        ends = np.exp((wide - wide.max()) / draw.temperature).cumsum()
        at = np.searchsorted(ids, token)
        u = uniform(draw.seed, choice=draw.choice, position=draw.position)
        before = ends[at - 1] / ends[-1] if at else 0.0
        if at < len(ids) and ids[at] == token and before - 1e-5 <= u <= ends[at] / ends[-1] + 1e-5:
            return True
    return False


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.value)
def test_draws_are_those_of_the_sampler(
    dtype: DType, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a last bit of a sum; the same alone, beside others, and on any number of threads."""
    monkeypatch.setattr("infc.ir.weights.require_finite", lambda *_: None)
    table = long_rows(DTYPES[dtype])
    artifact = build(program(table, dtype), tmp_path / "a", resolve_target(target))
    values: NDArray[np.float32] = table.float().numpy()
    draws = random_draws(np.random.default_rng(2), 800)
    step = asking(rows_step(list(range(16))), [], draws)
    expected = head_output(step, values, None)
    output = run_step(open_cpp(artifact, num_threads=2), step)
    assert output.logits.shape == (0, LONG)
    apart = np.flatnonzero(output.tokens != expected.tokens)
    assert len(apart) <= 8
    for place in apart.tolist():
        draw = draws[place]
        assert is_possible(values[draw.row], draw, int(output.tokens[place])), draw
    with_one = open_cpp(artifact, num_threads=1)
    for place in range(0, 800, 40):
        alone = asking(rows_step(list(range(16))), None, [draws[place]])
        assert run_step(with_one, alone).tokens[0] == output.tokens[place]


def some_adjustment(rng: np.random.Generator) -> Adjustment:
    bias_ids, count_ids = (
        rng.permutation(LONG)[: rng.choice([0, 50])].astype(np.int32) for _ in range(2)
    )
    masks = [None, packed(rng.random(LONG) < 0.5), packed(rng.random(LONG) < 0.01)]
    return Adjustment(
        repetition=float(rng.choice([1.0, 1.1, 3.0])),
        frequency=float(rng.choice([0.0, 0.5])),
        presence=float(rng.choice([0.0, -0.5])),
        bias_ids=bias_ids,
        bias=rng.choice([1.0, 50.0, -np.inf], len(bias_ids)).astype(np.float32),
        count_ids=count_ids,
        counts=rng.integers(0, 4, len(count_ids)).astype(np.int32),
        mask=masks[rng.integers(3)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.value)
def test_adjusted_draws_are_those_of_the_sampler(
    dtype: DType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside others of the same rows, whose logits come back as they were."""
    monkeypatch.setattr("infc.ir.weights.require_finite", lambda *_: None)
    table = long_rows(DTYPES[dtype])
    artifact = build(program(table, dtype), tmp_path / "a", resolve_target("native"))
    values: NDArray[np.float32] = table.float().numpy()
    rng = np.random.default_rng(4)
    draws = random_draws(rng, 200)
    chosen = sorted(rng.permutation(200)[:120].tolist())
    adjustments = gather(chosen, [some_adjustment(rng) for _ in chosen])
    step = replace(asking(rows_step(list(range(16))), None, draws), adjustments=adjustments)
    expected = head_output(step, values, None)
    plain = head_output(replace(step, adjustments=None), values, None)
    assert np.count_nonzero(expected.tokens != plain.tokens) > 50
    for threads in (1, 2):
        output = run_step(open_cpp(artifact, num_threads=threads), step)
        np.testing.assert_array_equal(output.logits, values)
        apart = np.flatnonzero(output.tokens != expected.tokens).tolist()
        assert len(apart) <= 3
        for place in apart:
            row = values[draws[place].row]
            if place in chosen:
                row = adjusted_row(row, adjustments, chosen.index(place))
            assert is_possible(row, draws[place], int(output.tokens[place]))


def test_the_random_number_is_the_samplers(tmp_path: Path) -> None:
    """Of equal logits the token is the number itself, in steps of the vocabulary."""
    table = torch.zeros(16, 4096)
    artifact = build(program(table, DType.F32), tmp_path / "a", resolve_target("native"))
    draws = [
        d._replace(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
        for d in random_draws(np.random.default_rng(3), 200)
    ]
    step = asking(rows_step(list(range(16))), [], draws)
    output = run_step(open_cpp(artifact, num_threads=1), step)
    numbers = [uniform(d.seed, choice=d.choice, position=d.position) for d in draws]
    assert output.tokens.tolist() == [int(u * 4096) for u in numbers]
