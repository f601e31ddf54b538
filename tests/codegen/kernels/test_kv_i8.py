"""The 8-bit cache: what is stored bit for bit, attention over it, and what must not matter."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.ir.resources import KvGroup

from .cache import (
    SHARED,
    CodeCache,
    Heads,
    Options,
    Sequence,
    alone,
    check_heads_that_share_keys,
    check_shared_context,
    in_pieces,
    random_sequence,
    reference,
    step,
)
from .harness import DTYPES, RUNNABLE, TARGETS, Array, Kernels, same_bits
from .test_attention import CASES
from .test_rope_kv import angles
from .test_scaled_linear import build, quantized


@pytest.fixture(
    scope="session", params=[(t, d) for t in TARGETS for d in DTYPES], ids=lambda p: "-".join(p)
)
def k8(request: pytest.FixtureRequest) -> Kernels:
    return build(*request.param)


def codes_of(k: Kernels, x: Array) -> tuple[Array, Array]:
    """Codes and scales of x [n, G, D], a row a token and head."""
    codes, scale = quantized(k.values(x).reshape(-1, x.shape[-1]))
    return codes.reshape(x.shape), scale.reshape(x.shape[:2])


def test_header_and_program_agree_on_the_bytes_of_a_block(k8: Kernels) -> None:
    group = KvGroup("full", (0, 1), 3, 24, 9, "i8", 32)
    assert group.bytes_per_block() == 2 * k8.call("layer_bytes", 3, 24, 9, 32)


@pytest.mark.parametrize("rope", [False, True])
def test_codes_and_scales_are_stored_bit_for_bit(k8: Kernels, rope: bool) -> None:
    heads = Heads(4, 2, 24, 9)
    s = random_sequence(k8, np.random.default_rng(1), 41, heads)
    s.v[7] = k8.array(np.zeros((1, 9)))
    cache = CodeCache(k8, heads, [41, 41], 16)
    slots = cache.slots(1, 0, 41)
    keys = s.k
    with k8.team(3) as team:
        if rope:
            turn = (*angles(np.arange(41), 20), 20)
            q, fused_q, keys = k8.poison(41, 4, 24), k8.poison(41, 4, 24), k8.poison(41, 2, 24)
            k8.call("rope_heads", team, s.q, 96, q, 96, *turn, 4, 24, 41)
            k8.call("rope_heads", team, s.k, 48, keys, 48, *turn, 2, 24, 41)
            k8.call(
                "rope_write_kv",
                team,
                *(s.q, 96, fused_q, 96, s.k, 48, s.v, 18, *turn, 4, cache.view(), slots, 41),
            )
            assert same_bits(fused_q, q)
        else:
            k8.call("write_kv", team, s.k, 48, s.v, 18, slots, 41, cache.view())
    k, v, k_scale, v_scale = cache.parts(1, 41)
    expected = codes_of(k8, keys), codes_of(k8, s.v)
    assert same_bits(k, expected[0][0]) and same_bits(k_scale, expected[0][1])
    assert same_bits(v, expected[1][0]) and same_bits(v_scale, expected[1][1])
    assert not v[7].any() and not v_scale[7].any()
    untouched = np.delete(cache.memory[:, 1], cache.tables[1, :3], axis=0)
    assert (untouched == 0xFF).all() and (cache.memory[:, 0] == 0xFF).all()


@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_over_what_the_codes_stand_for(k8: Kernels, case: str) -> None:
    heads, options = CASES[case]
    rng = np.random.default_rng(0)
    lengths = [1, 300, 17, 530]
    sequences = [random_sequence(k8, rng, n, heads) for n in lengths]
    cache = CodeCache(k8, heads, lengths, 32)
    ys = step(cache, sequences, [(0, n) for n in lengths], options)
    for i, (s, y) in enumerate(zip(sequences, ys, strict=True)):
        exact = reference(k8, Sequence(s.q, *cache.stored(i, s.length)), heads, options)
        error = np.abs(k8.values(y) - exact)
        assert (error <= k8.eps * np.abs(exact) + 1e-5).all(), f"{s.length}: {error.max()}"


@settings(max_examples=15)
@given(
    st.sampled_from(RUNNABLE),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(CASES)),
    st.sampled_from([16, 48]),
    st.lists(st.integers(1, 600), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_bits_do_not_depend_on_chunks_neighbours_or_threads(
    target: str, dtype: str, case: str, block: int, lengths: list[int], threads: int, seed: int
) -> None:
    k = build(target, dtype)
    heads, options = CASES[case]
    rng = np.random.default_rng(seed)
    sequences = [random_sequence(k, rng, n, heads) for n in lengths]
    cache = CodeCache(k, heads, lengths, block, seed % 97)
    ys = in_pieces(cache, sequences, rng, options, threads)
    for s, y in zip(sequences, ys, strict=True):
        assert same_bits(y, alone(CodeCache, k, s, heads, options))


def test_heads_that_share_codes_do_not_change_each_other(k8: Kernels) -> None:
    check_heads_that_share_keys(CodeCache, k8, (40, 104))


@pytest.mark.parametrize("case", SHARED)
def test_a_shared_context_has_the_bits_of_one_thread(k8: Kernels, case: str) -> None:
    check_shared_context(CodeCache, k8, case)


@pytest.mark.parametrize("filling", [0xFF, 0x7F, 0x80, 0x00])
def test_what_lies_beside_a_span_changes_nothing(k8: Kernels, filling: int) -> None:
    # As scales the fillings are NaN, a huge number, a tiny one and zero.
    heads, options = Heads(4, 2, 16, 16), Options(window=21)
    s = random_sequence(k8, np.random.default_rng(1), 70, heads)
    expected = alone(CodeCache, k8, s, heads, options)
    cache = CodeCache(k8, heads, [70], 16)
    cache.memory[:] = filling
    step(cache, [s], [(0, 49)], options)
    # What has left the window of the rows to come may hold anything again.
    cache.memory[cache.tables[0, :1]] = 0xFF
    assert same_bits(step(cache, [s], [(49, 70)], options)[0], expected[49:])
