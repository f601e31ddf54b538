"""Paged attention: values against float64; bits against chunking, neighbours and threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .cache import Cache, Heads, Options, Sequence, random_sequence, reference, step
from .harness import DTYPES, RUNNABLE, Array, Kernels, kernels, same_bits

SINKS = np.array([0.5, -1.0, 2.0, 0.0, 1.0, -3.0, 0.25], np.float32)
CASES = {
    "mha": (Heads(4, 4, 16, 16), Options()),
    "gqa": (Heads(14, 2, 64, 64), Options()),
    "odd": (Heads(6, 3, 7, 5), Options()),
    "wide": (Heads(2, 1, 80, 112), Options()),
    "window": (Heads(4, 2, 16, 32), Options(window=37)),
    "softcap": (Heads(4, 2, 24, 24), Options(softcap=5.0)),
    "sinks": (Heads(7, 1, 32, 17), Options(sinks=SINKS)),
    "all": (Heads(7, 1, 20, 20), Options(window=300, softcap=9.0, sinks=SINKS)),
}


def alone(k: Kernels, s: Sequence, heads: Heads, options: Options, threads: int = 1) -> Array:
    """The whole sequence in one step, by itself."""
    cache = Cache(k, heads, [s.length], 16)
    return step(cache, [s], [(0, s.length)], options, threads)[0]


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
    done = [0] * len(lengths)
    parts: list[list[Array]] = [[] for _ in lengths]
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        # Some sequences get a chunk, some one token, some nothing: an empty row range.
        takes = [
            min(n - d, int(rng.choice([0, 1, 7, 200, 600])))
            for d, n in zip(done, lengths, strict=True)
        ]
        if not any(takes):
            continue
        spans = [(d, d + n) for d, n in zip(done, takes, strict=True)]
        for i, y in enumerate(step(cache, sequences, spans, options, threads)):
            parts[i].append(y)
            done[i] += takes[i]
    for s, pieces in zip(sequences, parts, strict=True):
        assert same_bits(np.concatenate(pieces), alone(k, s, heads, options))


def test_a_longer_future_changes_nothing(k: Kernels) -> None:
    # The cache beyond a row's position holds another sequence's leftovers: NaN, infinity, numbers.
    heads = Heads(4, 2, 16, 16)
    s = random_sequence(k, np.random.default_rng(1), 70, heads)
    expected = alone(k, s, heads, Options())[49]
    for filling in (np.nan, np.inf, -0.0, 1e30):
        cache = Cache(k, heads, [70], 16)
        cache.memory[:] = k.array(np.float32(filling).reshape(1))
        step(cache, [s], [(0, 49)])
        assert same_bits(step(cache, [s], [(49, 50)])[0][0], expected)


def test_a_window_of_one_returns_the_value_itself(k: Kernels) -> None:
    heads = Heads(2, 2, 16, 16)
    s = random_sequence(k, np.random.default_rng(2), 40, heads)
    assert same_bits(alone(k, s, heads, Options(window=1)), s.v)
    wider = alone(k, s, heads, Options(window=2))
    assert not same_bits(wider, s.v)


def last_row(cache: Cache, s: Sequence) -> Array:
    """The last token's heads, decoded after all before it."""
    step(cache, [s], [(0, s.length - 1)])
    y: Array = step(cache, [s], [(s.length - 1, s.length)])[0][0]
    return y


@pytest.mark.parametrize("sizes", [(40, 104), (64, 64), (128, 16)])
def test_heads_that_share_keys_do_not_change_each_other(k: Kernels, sizes: tuple[int, int]) -> None:
    s = random_sequence(k, np.random.default_rng(4), 90, Heads(13, 1, *sizes))

    def rows(heads: slice) -> Array:
        q = s.q[:, heads].copy()
        cache = Cache(k, Heads(q.shape[1], 1, *sizes), [90], 16)
        return last_row(cache, Sequence(q, s.k, s.v))

    single = np.concatenate([rows(slice(head, head + 1)) for head in range(13)])
    for count in range(2, 14):
        assert same_bits(rows(slice(count)), single[:count]), count


def test_more_threads_than_heads_share_a_decoding_row(k: Kernels) -> None:
    heads = Heads(7, 1, 32, 32)
    s = random_sequence(k, np.random.default_rng(3), 90, heads)
    whole = alone(k, s, heads, Options())
    for threads in (1, 3, 5):
        cache = Cache(k, heads, [90], 16)
        step(cache, [s], [(0, 89)], threads=threads)
        assert same_bits(step(cache, [s], [(89, 90)], threads=threads)[0], whole[89:])
