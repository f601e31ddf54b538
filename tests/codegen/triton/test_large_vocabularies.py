"""Draws from rows of many parts, by compiled kernels in the emulation: those of numpy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infc.ir.targets import resolve_target
from infc.runtime.sampling.draws import GREEDY, Draw, draws_of
from infc.runtime.sampling.sampler import drawn_token
from infc.runtime.scheduling.step import NO_TOKEN

from ...gpu_breadth import RARELY
from .emulating import Emulating
from .running import Runner
from .test_sampling import Rows, rows_program, step_of

PLAIN = GREEDY._replace(temperature=1.0)
DRAWS = (
    GREEDY,
    PLAIN._replace(temperature=0.7, top_k=50, top_p=0.9, seed=1),
    PLAIN._replace(top_p=0.95, seed=2),
    PLAIN._replace(top_k=20, seed=3),
    PLAIN._replace(min_p=0.05, seed=4),
    PLAIN._replace(temperature=3.0, top_k=3000, top_p=0.999, min_p=0.001, seed=5),
    PLAIN._replace(temperature=20.0, seed=6),
)
TIES = (
    PLAIN._replace(top_k=100, top_p=0.8, seed=7),
    PLAIN._replace(top_p=0.3, seed=8),
    PLAIN._replace(top_k=5, seed=9),
)


def rows_of(vocab: int) -> Rows:
    """Like those of a model; with many ties; equal but for two; broken in the last place."""
    rng = np.random.default_rng(vocab)
    rows = (rng.standard_normal((4, vocab)) * 3).astype(np.float32)
    rows[0, rng.permutation(vocab)[:40]] += 8
    rows[1] = rows[1].round()
    rows[2] = -1.25
    rows[2, [vocab // 2, vocab - 1]] = 1.0
    rows[3, vocab - 1] = np.nan
    return rows


def draws() -> Iterator[Draw]:
    for seed in range(2):
        yield from (one._replace(position=seed, row=0) for one in DRAWS)
    for row in (1, 2):
        yield from (one._replace(row=row) for one in TIES)
    yield DRAWS[1]._replace(row=3)
    yield GREEDY._replace(row=2)


@pytest.mark.parametrize(
    ("target", "vocab"),
    [
        *(("sm_90", 8191), ("sm_90", 12289), ("sm_80", 151936)),
        *(pytest.param("sm_80", vocab, marks=RARELY) for vocab in (4097, 32003, 262144)),
        pytest.param("sm_90", 128256, marks=RARELY),
    ],
)
def test_draws_are_those_of_numpy(target: str, vocab: int, tmp_path: Path) -> None:
    rows, some, machine = rows_of(vocab), list(draws()), resolve_target(target)
    process, program = Emulating(machine), rows_program(vocab, len(rows))
    weights = {"rows": torch.from_numpy(rows)}
    runner = Runner(program, weights.__getitem__, process, num_blocks=4, target=machine)
    codes = runner.made.codes
    process.compile({k: codes[k] for k in codes if not k.startswith("adjust")}, tmp_path)
    found = runner.run(replace(step_of(len(rows)), draws=draws_of(some))).tokens.tolist()
    wanted = [drawn_token(rows[one.row], one) for one in some]
    assert found == [NO_TOKEN if token is None else token for token in wanted]
    assert len(set(found)) > len(found) // 3 and NO_TOKEN in found
