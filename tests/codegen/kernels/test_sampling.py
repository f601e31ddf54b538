"""Tokens from logits: adjusted rows bit for bit as in numpy, and the short way of top-k."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from infc.runtime.sampling.adjustments import (
    ADJUSTED,
    NO_MASK,
    Adjusted,
    Adjustments,
    adjusted_row,
    packed,
)
from infc.runtime.sampling.draws import DRAW, Draw

from ... import sanitizers
from .harness import DTYPES, TARGETS, Array, Kernels, kernels, same_bits

WRAPPER = Path(__file__).parent / "wrapper_sampling.cpp"
WIDTHS = (1, 15, 16, 17, 31, 33, 64, 75, 1001, 4129)


@pytest.fixture(
    scope="session", params=[(t, d) for t in TARGETS for d in DTYPES], ids=lambda p: "-".join(p)
)
def ks(request: pytest.FixtureRequest) -> Kernels:
    return kernels(*request.param, WRAPPER)


def some_row(rng: np.random.Generator, width: int) -> Array:
    """Logits of all sizes, with equals, zeros of both signs, subnormals and forbidden tokens."""
    row: Array = (rng.standard_normal(width) * rng.choice([1e-38, 0.1, 10.0, 1e30])).astype(
        np.float32
    )
    odd = np.array([0.0, -0.0, 2.5, 1e-40, -1e-42, -np.inf, 3e38], np.float32)
    at = rng.random(width) < 0.3
    row[at] = rng.choice(odd, np.count_nonzero(at))
    return row


def some_adjustments(
    rng: np.random.Generator, width: int, parts: tuple[bool, bool, bool]
) -> Adjustments:
    """One row of them, behind entries that are not its own, which would spoil any row."""
    biased, counted, masked = parts

    def ids(wanted: bool) -> Array:
        count = rng.integers(0, width + 1) if wanted else 0
        return rng.permutation(width)[:count].astype(np.int32)

    def beside(values: Array, poison: float) -> Array:
        around = np.full(3, poison, values.dtype)
        return np.concatenate([around, values, around])

    bias_ids, count_ids = ids(biased), ids(counted)
    bias = (rng.standard_normal(len(bias_ids)) * 50).astype(np.float32)
    bias[rng.random(len(bias)) < 0.2] = -np.inf
    counts = (rng.integers(0, 5, len(count_ids)) ** 7).astype(np.int32)
    allowed = rng.random(width) < rng.choice([0.0, 0.5, 1.0])
    mask = packed(allowed)
    mask[-1] |= np.uint32((0xFFFFFFFF << (width % 32)) & 0xFFFFFFFF if width % 32 else 0)
    entry = Adjusted(
        draw=0,
        mask=1 if masked else NO_MASK,
        bias_begin=3,
        bias_end=3 + len(bias),
        counts_begin=3,
        counts_end=3 + len(counts),
        repetition=float(rng.choice([1.0, 1.1, 0.01, 100.0])),
        frequency=float(rng.choice([0.0, 0.7, -2.0])),
        presence=float(rng.choice([0.0, -0.3, 2.0])),
    )
    return Adjustments(
        rows=np.array([entry], ADJUSTED),
        bias_ids=beside(bias_ids, 0),
        bias=beside(bias, np.nan),
        count_ids=beside(count_ids, 0),
        counts=beside(counts, 2**30),
        masks=np.stack([np.zeros_like(mask), mask]),
    )


def adjust(k: Kernels, row: Array, a: Adjustments) -> tuple[bool, Array]:
    """The row by the kernel, between poison, and whether it is valid."""
    width = len(row)
    x = k.poison(width + 40)
    x[:width] = row
    y = np.full(width + 16, np.nan, np.float32)
    with k.team(1) as team:
        arrays = (a.rows, 0, a.bias_ids, a.bias, a.count_ids, a.counts, a.masks)
        valid = k.call("adjust", team, x, *arrays, a.masks.shape[1], y, width)
    assert np.isnan(y[width:]).all(), "wrote past the row"
    return bool(valid), y[:width].copy()


PARTS = [*product([False, True], [False, True], [False, True])]


@pytest.mark.parametrize("width", WIDTHS)
def test_adjusted_rows_have_the_bits_of_numpy(ks: Kernels, width: int) -> None:
    rng = np.random.default_rng(width)
    for parts in PARTS * 6:
        row = ks.array(some_row(rng, width))
        adjustments = some_adjustments(rng, width, parts)
        values = ks.values(row).astype(np.float32)
        valid, given = adjust(ks, row, adjustments)
        assert valid
        assert same_bits(given, adjusted_row(values, adjustments, 0)), parts


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_rows_without_a_finite_maximum_are_told_also_where_it_is_masked(
    ks: Kernels, bad: float
) -> None:
    rng = np.random.default_rng(0)
    for width in (1, 16, 75, 1001):
        for place in {0, width // 2, width - 1}:
            values = np.zeros(width, np.float32)
            values[place] = bad
            row = ks.array(values)
            for masked in (False, True):
                assert not adjust(ks, row, some_adjustments(rng, width, (False, False, masked)))[0]


LONG = 13_333
SHARE = 1 / 25 if sanitizers.ACTIVE else 1.0
"""Of the draws from such rows: with sanitizers each takes some 20 ms."""


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
    for _ in range(round(SHARE * count)):
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


@pytest.mark.parametrize("width", [75, 1001, LONG])
def test_a_mask_alone_is_that_of_a_row_with_minus_infinity(ks: Kernels, width: int) -> None:
    rng = np.random.default_rng(width)
    for share, bad in ((0.5, 0.0), (20 / width, 0.0), (0.0, 0.0), (0.5, np.nan), (0.5, np.inf)):
        values = (rng.standard_normal(width) * 3).astype(np.float32)
        allowed = rng.random(width) < share
        allowed[7], values[7] = False, bad
        row, masked = ks.array(values), ks.array(np.where(allowed, values, -np.inf))
        wanted = np.array([draw._replace(row=0) for draw in draws(1, 200)], DRAW)
        wanted["temperature"][::4] = 0.0
        given = [np.zeros(len(wanted), np.int32) for _ in range(2)]
        with ks.team(1, ks.call("scratch_bytes", width)) as team:
            mask = packed(allowed)
            ks.call("draw_masked", team, row, width, mask, wanted, given[0], len(wanted))
            ks.call("draw", team, masked, width, wanted, given[1], len(wanted), 0)
        assert (
            given[0].tolist() == (given[1] if bad == 0.0 else np.full_like(given[1], -1)).tolist()
        )


def test_shares_at_their_very_limit(ks: Kernels) -> None:
    """Equal weights, so that top-p is decided by how sums are rounded."""
    rows = np.full((1, LONG), -9.0, np.float32)
    places = np.random.default_rng(3).permutation(LONG)[:60]
    rows[0, places] = np.repeat([1.0, 1.1, 1.3], 20)
    x = ks.array(rows)
    wanted = [
        Draw(i, 1.0, top, 0.0, count, 0, 0, 0)
        for i in range(round(SHARE * 40))
        for count in (20, 40, 60)
        for top in (0.25, 0.5, 1 / 3, 2 / 3, 0.1, 0.9)
    ]
    arrays = np.array(wanted, DRAW)
    with ks.team(1, ks.call("scratch_bytes", LONG)) as team:
        given = [np.zeros(len(arrays), np.int32) for _ in range(2)]
        for whole, tokens in enumerate(given):
            ks.call("draw", team, x, LONG, arrays, tokens, len(arrays), whole)
    assert given[0].tolist() == given[1].tolist()
