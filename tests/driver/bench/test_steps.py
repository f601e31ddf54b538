"""Steps made by hand, and where their time goes line by line."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.driver.bench.ops import measure_steps
from infc.driver.bench.trial_steps import TrialStep, fill_blocks
from infc.ir.artifact import Artifact
from infc.ir.errors import UsageError
from infc.ir.resources import KvGroup
from infc.ir.roofline import Ceilings
from infc.runtime.executors import open_executor
from infc.runtime.executors.base import ExecutorConfig, run_step

from ...codegen.harness import Chunk, make_step


def manifest(block_size: int, groups: int) -> Any:
    group = KvGroup("g", (0,), 1, 8, 8, "f32", block_size)
    resources = tuple(replace(group, name=str(i)) for i in range(groups))
    main = SimpleNamespace(resources=resources)
    return SimpleNamespace(main=main, model=SimpleNamespace(vocab_size=50))


trials = st.integers(1, 40).flatmap(
    lambda context: st.builds(
        TrialStep, st.integers(1, 4), st.integers(1, context), st.just(context)
    )
)


@given(trials, st.sampled_from([4, 16]), st.integers(0, 2))
def test_steps_are_those_of_sequences_with_blocks_of_their_own(
    trial: TrialStep, block_size: int, groups: int
) -> None:
    step = trial.build(manifest(block_size, groups))
    each = -(-trial.context // block_size)
    ids = step.token_ids.reshape(trial.batch, trial.queries).tolist()
    chunks = [
        Chunk(row, trial.context - trial.queries, range(1 + b * each, 1 + (b + 1) * each))
        for b, row in enumerate(ids)
    ]
    last = [(b + 1) * trial.queries - 1 for b in range(trial.batch)]
    expected = make_step(chunks, num_groups=groups, block_size=block_size, rows=last)
    for name in ("positions", "query_starts", "context_lengths", "logits_index"):
        assert np.array_equal(getattr(step, name), getattr(expected, name)), name
    for name in ("block_tables", "slots"):
        for ours, theirs in zip(getattr(step, name), getattr(expected, name), strict=True):
            assert np.array_equal(ours, theirs), name
            assert ours.dtype == np.int32
    most = max((int(table.max()) for table in step.block_tables), default=0)
    assert all(most < count for count in trial.num_blocks(manifest(block_size, groups)))
    assert trial.shape.tokens == step.num_tokens
    assert trial.shape.rows == len(step.logits_index)


def test_lines_are_named_predicted_and_fill_the_step(compiled: Artifact, slow: Ceilings) -> None:
    heard: list[tuple[int, int]] = []
    steps = measure_steps(
        compiled,
        {"decode": TrialStep(3, 1, 40), "prefill": TrialStep(1, 50, 50)},
        threads=1,
        ceilings=slow,
        repeats=8,
        on_step=lambda done, total: heard.append((done, total)),
    )
    assert heard == [(done, 16) for done in range(1, 17)]
    for step in steps:
        assert sum(line.measured for line in step.lines) <= step.measured
        assert step.predicted is not None
        # Nodes without a line of their own, views, take no time.
        predicted = [line.predicted for line in step.lines if line.predicted is not None]
        assert sum(predicted) == pytest.approx(step.predicted)
        ops = {line.name: line for line in step.by_name()}
        assert ops["paged_attention"].runs == ops["paged_attention"].nodes == 2
        assert sum(line.measured for line in ops.values()) == pytest.approx(
            sum(line.measured for line in step.lines)
        )
    decode, prefill = steps
    assert prefill.measured > decode.measured / 10
    (unknown,) = measure_steps(
        compiled, {"decode": TrialStep(1, 1, 8)}, threads=1, ceilings=None, repeats=1
    )
    assert {line.predicted for line in (*unknown.lines, *unknown.by_name())} == {None}


def test_a_backend_that_cannot_tell_says_so(small: Artifact) -> None:
    with pytest.raises(UsageError, match="the backend reference cannot measure the time"):
        measure_steps(small, {"decode": TrialStep(1, 1, 8)}, threads=1, ceilings=None)


def test_filled_blocks_are_what_sequences_find(compiled: Artifact) -> None:
    trial = TrialStep(2, 1, 70)
    num_blocks = trial.num_blocks(compiled.manifest)
    executor = open_executor(compiled, ExecutorConfig(num_blocks=num_blocks))
    step = replace(trial.build(compiled.manifest), logits_rows=None)
    empty = run_step(executor, step).logits
    fill_blocks(executor, compiled.manifest, num_blocks)
    filled = run_step(executor, step).logits
    # With one token in both sequences and the same behind them, both get the same.
    same = replace(step, token_ids=np.zeros_like(step.token_ids))
    first, second = run_step(executor, same).logits
    executor.close()
    assert np.isfinite(filled).all()
    assert not np.array_equal(empty, filled)
    assert np.array_equal(first, second)
