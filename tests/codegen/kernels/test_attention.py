"""Paged attention: values against float64; bits against chunking, neighbours and threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .cache import (
    SHARED,
    Cache,
    Heads,
    Options,
    alone,
    check_heads_that_share_keys,
    check_shared_context,
    check_threads_change_no_bits,
    in_pieces,
    random_sequence,
    reference,
    split_plan,
    step,
)
from .harness import DTYPES, RUNNABLE, Kernels, kernels, same_bits

SINKS = np.array([0.5, -1.0, 2.0, 0.0, 1.0, -3.0, 0.25], np.float32)
CASES = {
    "mha": (Heads(4, 4, 16, 16), Options()),
    "gqa": (Heads(14, 2, 64, 64), Options()),
    "odd": (Heads(6, 3, 7, 5), Options()),
    "wide": (Heads(2, 1, 80, 112), Options()),
    "mqa": (Heads(29, 1, 16, 16), Options()),
    "window": (Heads(4, 2, 16, 32), Options(window=37)),
    "softcap": (Heads(4, 2, 24, 24), Options(softcap=5.0)),
    "sinks": (Heads(7, 1, 32, 17), Options(sinks=SINKS)),
    "all": (Heads(7, 1, 20, 20), Options(window=300, softcap=9.0, sinks=SINKS)),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_matches_float64(k: Kernels, case: str) -> None:
    heads, options = CASES[case]
    rng = np.random.default_rng(0)
    lengths = [1, 300, 17, 530]
    sequences = [random_sequence(k, rng, n, heads) for n in lengths]
    cache = Cache(k, heads, lengths, 32)
    ys = step(cache, sequences, [(0, n) for n in lengths], options)
    for s, y in zip(sequences, ys, strict=True):
        exact = reference(k, s, heads, options)
        error = np.abs(k.values(y) - exact)
        assert (error <= k.eps * np.abs(exact) + 1e-5).all(), f"{s.length}: {error.max()}"


@settings(max_examples=25)
@given(
    st.sampled_from(RUNNABLE),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(CASES)),
    st.sampled_from([16, 32, 48, 64]),
    st.lists(st.integers(1, 600), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_bits_do_not_depend_on_chunks_neighbours_or_threads(
    target: str, dtype: str, case: str, block: int, lengths: list[int], threads: int, seed: int
) -> None:
    k = kernels(target, dtype)
    heads, options = CASES[case]
    rng = np.random.default_rng(seed)
    sequences = [random_sequence(k, rng, n, heads) for n in lengths]
    cache = Cache(k, heads, lengths, block, seed % 97)
    ys = in_pieces(cache, sequences, rng, options, threads)
    for s, y in zip(sequences, ys, strict=True):
        assert same_bits(y, alone(Cache, k, s, heads, options))


def test_a_longer_future_changes_nothing(k: Kernels) -> None:
    # The cache beyond a row's position holds another sequence's leftovers: NaN, infinity, numbers.
    heads = Heads(4, 2, 16, 16)
    s = random_sequence(k, np.random.default_rng(1), 70, heads)
    expected = alone(Cache, k, s, heads, Options())[49]
    for filling in (np.nan, np.inf, -0.0, 1e30):
        cache = Cache(k, heads, [70], 16)
        cache.memory[:] = k.array(np.float32(filling).reshape(1))
        step(cache, [s], [(0, 49)])
        assert same_bits(step(cache, [s], [(49, 50)])[0][0], expected)


def test_a_window_of_one_returns_the_value_itself(k: Kernels) -> None:
    heads = Heads(2, 2, 16, 16)
    s = random_sequence(k, np.random.default_rng(2), 40, heads)
    assert same_bits(alone(Cache, k, s, heads, Options(window=1)), s.v)
    wider = alone(Cache, k, s, heads, Options(window=2))
    assert not same_bits(wider, s.v)


@pytest.mark.parametrize("sizes", [(40, 104), (64, 64), (128, 16)])
def test_heads_that_share_keys_do_not_change_each_other(k: Kernels, sizes: tuple[int, int]) -> None:
    check_heads_that_share_keys(Cache, k, sizes)


def test_more_threads_than_heads_share_a_decoding_row(k: Kernels) -> None:
    heads = Heads(7, 1, 32, 32)
    s = random_sequence(k, np.random.default_rng(3), 90, heads)
    whole = alone(Cache, k, s, heads, Options())
    for threads in (1, 3, 5):
        cache = Cache(k, heads, [90], 16)
        step(cache, [s], [(0, 89)], threads=threads)
        assert same_bits(step(cache, [s], [(89, 90)], threads=threads)[0], whole[89:])


LENGTHS = st.one_of(st.integers(1, 6000), st.integers(1, 23).map(lambda n: 256 * n + 1))
SHARING = CASES | {name: case[:2] for name, case in SHARED.items()}


@settings(max_examples=25)
@given(
    st.sampled_from(RUNNABLE),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(SHARING)),
    st.lists(LENGTHS, min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(2, 6),
    st.integers(0, 2**32),
)
def test_threads_that_share_long_contexts_change_no_bits(
    target: str, dtype: str, case: str, lengths: list[int], tokens: int, threads: int, seed: int
) -> None:
    k = kernels(target, dtype)
    heads, options = SHARING[case]
    rng = np.random.default_rng(seed)
    sequences = [random_sequence(k, rng, n, heads) for n in lengths]
    cache = Cache(k, heads, lengths, 32, seed % 97)
    check_threads_change_no_bits(cache, sequences, tokens, options, threads)


@pytest.mark.parametrize("case", SHARED)
def test_a_shared_context_has_the_bits_of_one_thread(k: Kernels, case: str) -> None:
    check_shared_context(Cache, k, case)


def pieces(contexts: list[int], threads: int, kv_heads: int = 1, tokens: int = 1) -> int:
    """How many pieces the contexts make, of 7 heads to a KV head."""
    k = kernels(RUNNABLE[-1], "float")
    spans = [(n - tokens, n) for n in contexts]
    return split_plan(k, Heads(7 * kv_heads, kv_heads, 64, 64), spans, threads).pieces


def test_a_context_is_split_where_threads_would_wait() -> None:
    assert pieces([4000], 2) == 16
    assert pieces([4000], 8, kv_heads=2) == 32
    assert pieces([9000, 30, 40, 50], 4) == 39
    for whole in [
        pieces([4000], 1),
        pieces([4000], 2, kv_heads=2),
        pieces([200], 4),
        pieces([4000] * 64, 2),
        pieces([4000], 2, tokens=500),
        pieces([4000] * 4, 4),
    ]:
        assert whole == 0


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(4, 100_000)), min_size=1, max_size=40),
    st.integers(1, 16),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([0, 100, 5000]),
)
def test_a_split_fits_into_the_scratch_of_its_threads(
    rows: list[tuple[int, int]], threads: int, kv_heads: int, heads: int, window: int
) -> None:
    k = kernels(RUNNABLE[-1], "float")
    spans = [(end - tokens, end) for tokens, end in rows]
    plan = split_plan(k, Heads(kv_heads * heads, kv_heads, 64, 64), spans, threads, window)
    if plan.pieces == 0:
        return
    assert plan.rows == sum(tokens for tokens, _ in rows) * kv_heads * heads <= 64 * threads
    assert plan.unit_rows == max(tokens for tokens, _ in rows) * heads
    assert plan.slots >= 1 and plan.slots * plan.unit_rows <= 64
    if window == 0:
        chunks = [-(-end // 256) for tokens, end in rows if tokens]
        assert plan.pieces == kv_heads * sum(chunks)
