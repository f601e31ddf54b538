"""Paged attention: values against float64; bits against chunking, neighbours and threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .cache import (
    Cache,
    Heads,
    Options,
    alone,
    check_heads_that_share_keys,
    check_threads_share_contexts,
    in_pieces,
    random_sequence,
    reference,
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


@settings(max_examples=25)
@given(
    st.sampled_from(RUNNABLE),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(CASES)),
    st.lists(st.integers(1, 6000), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(2, 6),
    st.integers(0, 2**32),
)
def test_threads_that_share_long_contexts_change_no_bits(
    target: str, dtype: str, case: str, lengths: list[int], tokens: int, threads: int, seed: int
) -> None:
    k = kernels(target, dtype)
    heads, options = CASES[case]
    rng = np.random.default_rng(seed)
    sequences = [random_sequence(k, rng, n, heads) for n in lengths]
    cache = Cache(k, heads, lengths, 32, seed % 97)
    check_threads_share_contexts(cache, sequences, tokens, options, threads)


def split_plan(
    contexts: list[int],
    threads: int,
    *,
    kv_heads: int = 1,
    heads: int = 7,
    tokens: int = 1,
    window: int = 0,
) -> tuple[int, int, int, int]:
    """Pieces, rows, rows of a unit and slots of `plan_split`; no pieces where tiles stay whole."""
    starts = np.arange(len(contexts) + 1, dtype=np.int32) * tokens
    positions = np.concatenate([np.arange(n - tokens, n, dtype=np.int32) for n in contexts])
    plan = np.zeros(4, np.int64)
    count = len(contexts)
    kernels(RUNNABLE[-1], "float").call(
        "split_plan", starts, positions, count, kv_heads, heads, window, threads, plan
    )
    pieces, rows, unit_rows, slots = plan.tolist()
    return pieces, rows, unit_rows, slots


def test_a_context_is_split_where_threads_would_wait() -> None:
    assert split_plan([4000], 2) == (16, 7, 7, 8)
    assert split_plan([16000], 2) == (63, 7, 7, 8)  # in four rounds: nine slots are what there is
    assert split_plan([4000], 8, kv_heads=2)[0] == 32
    assert split_plan([9000, 30, 40, 50], 4)[0] == 39
    assert split_plan([9000], 2, window=4096)[0] == 17
    for whole in [
        split_plan([4000], 1),
        split_plan([4000], 2, kv_heads=2),
        split_plan([200], 4),
        split_plan([4000] * 64, 2),
        split_plan([4000], 2, tokens=500),
        split_plan([4000] * 4, 4),
    ]:
        assert whole[0] == 0


@given(
    st.lists(st.integers(4, 100_000), min_size=1, max_size=40),
    st.integers(1, 16),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 4),
)
def test_a_split_fits_into_the_scratch_of_its_threads(
    contexts: list[int], threads: int, kv_heads: int, heads: int, tokens: int
) -> None:
    pieces, rows, unit_rows, slots = split_plan(
        contexts, threads, kv_heads=kv_heads, heads=heads, tokens=tokens
    )
    if pieces == 0:
        return
    assert rows == len(contexts) * kv_heads * unit_rows
    assert pieces == kv_heads * sum(-(-n // 256) for n in contexts)
    assert slots >= 1 and slots * unit_rows <= 64 and rows <= 64 * threads
