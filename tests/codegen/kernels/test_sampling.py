"""Tokens from logits: the short way of top-k gives the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from infc.runtime.sampling.draws import DRAW, Draw

from .harness import DTYPES, TARGETS, Array, Kernels, kernels

WRAPPER = Path(__file__).parent / "wrapper_sampling.cpp"


@pytest.fixture(
    scope="session", params=[(t, d) for t in TARGETS for d in DTYPES], ids=lambda p: "-".join(p)
)
def ks(request: pytest.FixtureRequest) -> Kernels:
    return kernels(*request.param, WRAPPER)


LONG = 13_333


def long_rows(k: Kernels) -> Array:
    """Rows [.., LONG] of several shapes: what is greatest lies anywhere, in one place, is equal."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((12, LONG)).astype(np.float32)
    rows *= np.array([0.01, 1.0, 3.0, 10.0] * 3, np.float32)[:, None]
    rows[4] = np.sort(rows[4])
    rows[5] = (rows[5] * 4).round() / 4
    rows[6] = 2.5
    rows[7] = -np.inf
    rows[7, rng.permutation(LONG)[:40]] = rng.standard_normal(40)
    rows[8] = -np.inf
    rows[8, [5, LONG - 1]] = 0.0, -0.0
    rows[9] = np.where(rng.random(LONG) < 0.01, 1.0, -30.0)
    rows[10, 7000:7100] += 30
    rows[11, LONG - 1] = np.nan
    return k.array(rows)


def draws(num_rows: int, count: int = 3000) -> Iterator[Draw]:
    rng = np.random.default_rng(2)
    for _ in range(count):
        yield Draw(
            seed=int(rng.integers(2**64, dtype=np.uint64)),
            temperature=float(rng.choice([1e-40, 0.3, 1.0, 20.0])),
            top_p=float(rng.choice([1.0, 1e-310, 0.3, 0.8, 0.95, 0.9999])),
            min_p=float(rng.choice([0.0, 0.0, 0.05, 1.0])),
            top_k=int(rng.choice([1, 2, 3, 20, 40, 60])),
            row=int(rng.integers(num_rows)),
            choice=0,
            position=int(rng.integers(1000)),
        )


def test_weighing_only_what_top_k_keeps_changes_no_token(ks: Kernels) -> None:
    rows = long_rows(ks)
    wanted = np.array(list(draws(len(rows))), DRAW)
    with ks.team(1, ks.call("scratch_bytes", LONG)) as team:
        given = [np.zeros(len(wanted), np.int32) for _ in range(2)]
        for whole, tokens in enumerate(given):
            ks.call("draw", team, rows, LONG, wanted, tokens, len(wanted), whole)
        short = ks.call("num_short", team, rows, LONG, wanted, len(wanted))
    assert given[0].tolist() == given[1].tolist()
    assert short > len(wanted) / 2
    assert set(given[0][wanted["row"] == 11].tolist()) == {-1}


def test_shares_at_their_very_limit(ks: Kernels) -> None:
    """Equal weights, so that top-p is decided by how sums are rounded."""
    rows = np.full((1, LONG), -9.0, np.float32)
    places = np.random.default_rng(3).permutation(LONG)[:60]
    rows[0, places] = np.repeat([1.0, 1.1, 1.3], 20)
    x = ks.array(rows)
    wanted = [
        Draw(i, 1.0, top, 0.0, count, 0, 0, 0)
        for i in range(40)
        for count in (20, 40, 60)
        for top in (0.25, 0.5, 1 / 3, 2 / 3, 0.1, 0.9)
    ]
    arrays = np.array(wanted, DRAW)
    with ks.team(1, ks.call("scratch_bytes", LONG)) as team:
        given = [np.zeros(len(arrays), np.int32) for _ in range(2)]
        for whole, tokens in enumerate(given):
            ks.call("draw", team, x, LONG, arrays, tokens, len(arrays), whole)
    assert given[0].tolist() == given[1].tolist()
