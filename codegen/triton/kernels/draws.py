"""Tokens from rows of logits, to the meaning of `runtime/sampling/sampler.py`.

A row is cut without a sort. Logits are taken as unsigned numbers of the same order, and the least
that is kept is found digit by digit from the highest on: all parts of the row count what has each
value of a digit, and the last of them to arrive chooses one. Counts and weights are added up as
integers, so that the order does not matter.
"""

import triton
import triton.language as tl

from .sampling import LOWEST, order_of, place_in, scores

CUT = tl.constexpr(0)
"""Words of 64 bits of a draw's state: the order of the least logit that is kept,"""
TIES = tl.constexpr(1)
"""how many of those that equal it,"""
AMOUNT = tl.constexpr(2)
"""the count or weight to reach; 0 for draws that take the greatest,"""
LEAST = tl.constexpr(3)
"""the cut by count, below which that by share does not go,"""
ABOVE = tl.constexpr(4)
"""the amount of what lies above the digits chosen so far,"""
BIG = tl.constexpr(5)
"""the bits of the greatest logit,"""
GREATEST = tl.constexpr(6)
"""and its id."""
WORDS = tl.constexpr(8)
BINS = tl.constexpr(2048)


@triton.jit
def draw_tokens(
    draws,
    tops,
    places,
    tokens,
    states,
    bins,
    arrived,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
):
    """tokens[d] = the greatest, -1 where a row has NaN or no finite maximum. Program d.

    Draws that take another get a state, and are not done yet.
    """
    d = tl.program_id(0)
    record = draws + d * 6
    part = tl.arange(0, PARTS_BLOCK)
    best = tl.load(tops + d * PARTS + part, mask=part < PARTS, other=LOWEST)
    where = tl.load(places + d * PARTS + part, mask=part < PARTS, other=V)
    broken = tl.sum((best != best).to(tl.int32), 0)
    big = tl.max(tl.where(best != best, LOWEST, best), 0)
    token = tl.min(tl.where(best == big, where, V), 0)
    broken += ((big == float("inf")) | (big == LOWEST)).to(tl.int32)
    tl.store(tokens + d, tl.where(broken > 0, -1, token))
    state = states + d * WORDS
    temperature = tl.load(record + 1).to(tl.float64, bitcast=True)
    if (broken > 0) | (temperature == 0.0):
        tl.store(state + AMOUNT, 0)
    else:
        top_k = (tl.load(record + 4) & 0xFFFFFFFF).to(tl.int32)
        need = tl.where(top_k == 0, V, tl.minimum(top_k, V))
        tl.store(state + CUT, 0)
        tl.store(state + TIES, V)
        tl.store(state + AMOUNT, need.to(tl.int64))
        tl.store(state + BIG, big.to(tl.int32, bitcast=True).to(tl.int64))
        tl.store(state + GREATEST, token.to(tl.int64))
        tl.store(state + LEAST, 0)
        tl.store(state + ABOVE, 0)
        tl.store(bins + d.to(tl.int64) * BINS + tl.arange(0, BINS), tl.zeros((BINS,), tl.int64))
        tl.store(arrived + d, 0)


@triton.jit
def narrow_cuts(
    logits,
    draws,
    adjusted,
    num_adjusted,
    changed,
    states,
    states_after,
    bins,
    arrived,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST_ADJUSTED: tl.constexpr,
    SHARE: tl.constexpr,
    ONE: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The digit of WIDTH bits above SHIFT of the cut by `top_k`, or with SHARE by `top_p`.

    States are read by all parts and written elsewhere, for the next launch. ONE is the greatest
    weight as an integer. Program (draw, part).
    """
    d = tl.program_id(0)
    record = draws + d * 6
    state = states + d * WORDS
    after = states_after + d * WORDS
    amount = tl.load(state + AMOUNT)
    top_p = tl.load(record + 2).to(tl.float64, bitcast=True)
    wanted = amount > 0
    if SHARE:
        wanted = wanted & (top_p < 1.0)
    else:
        wanted = wanted & (amount < V)
    if wanted:
        cut = tl.load(state + CUT).to(tl.uint32)
        least = tl.load(state + LEAST).to(tl.uint32)
        big = tl.load(state + BIG).to(tl.int32).to(tl.float32, bitcast=True)
        t = _temperature(record)
        row = (tl.load(record + 4) >> 32).to(tl.int64)
        a = place_in(adjusted, num_adjusted, d, MOST_ADJUSTED)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        value = scores(logits, changed, row, a, at, V)
        order = order_of(value)
        live = at < V
        if SHIFT + WIDTH < 32:
            live = live & ((order >> (SHIFT + WIDTH)) == (cut >> (SHIFT + WIDTH)))
        place = bins + d.to(tl.int64) * BINS + _digit(order, SHIFT, WIDTH)
        if SHARE:
            mine = _whole(value, big, t, ONE)
            tl.atomic_add(place, mine, mask=live & (order > least) & (mine > 0), sem="relaxed")
        else:
            tl.atomic_add(place, tl.full((BLOCK,), 1, tl.int64), mask=live, sem="relaxed")
        # All threads have added before one counts; the last sees what all have added.
        tl.debug_barrier()
        before = tl.atomic_add(arrived + d, 1, sem="acq_rel", scope="gpu")
        if before == PARTS - 1:
            tl.store(arrived + d, 0)
            _choose(
                state, after, bins + d.to(tl.int64) * BINS, cut, least, top_p, big, t,
                SHARE, ONE, SHIFT, WIDTH,
            )  # fmt: skip
    elif tl.program_id(1) == 0:
        word = tl.arange(0, WORDS)
        tl.store(after + word, tl.load(state + word))


@triton.jit
def _choose(
    state,
    after,
    bins,
    cut,
    least,
    top_p,
    big,
    t,
    SHARE: tl.constexpr,
    ONE: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Take the greatest digit from which on there is enough, and leave the bins empty."""
    i = tl.arange(0, BINS)
    counts = tl.load(bins + i)
    tl.store(bins + i, tl.zeros((BINS,), tl.int64))
    amount = tl.load(state + AMOUNT)
    above = tl.load(state + ABOVE)
    ties = tl.load(state + TIES)
    if SHARE:
        # Of those that equal the cut by count, only the ties are there.
        inside = least > 0
        if SHIFT + WIDTH < 32:
            inside = inside & ((least >> (SHIFT + WIDTH)) == (cut >> (SHIFT + WIDTH)))
        equal = ties * _whole(_number(least), big, t, ONE)
        mine = inside & (i == _digit(least, SHIFT, WIDTH))
        counts += tl.where(mine, equal, 0)
        if SHIFT + WIDTH == 32:
            total = tl.sum(counts, 0)
            share = tl.ceil(top_p * total.to(tl.float64)).to(tl.int64)
            amount = tl.maximum(tl.minimum(share, total), 1)
            cut = cut & 0
            above = above * 0
    reached = above + tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    digit = tl.max(tl.where(reached >= amount, i, 0), 0)
    above += tl.sum(tl.where(i > digit, counts, 0), 0)
    cut = cut | (digit.to(tl.uint32) << SHIFT)
    if SHIFT == 0:
        ties = amount - above
        if SHARE:
            weight = tl.maximum(_whole(_number(cut), big, t, ONE), 1)
            ties = (ties + weight - 1) // weight
        else:
            least = cut
    tl.store(after + CUT, cut.to(tl.int64))
    tl.store(after + TIES, ties)
    tl.store(after + AMOUNT, amount)
    tl.store(after + LEAST, least.to(tl.int64))
    tl.store(after + ABOVE, above)
    tl.store(after + BIG, tl.load(state + BIG))
    tl.store(after + GREATEST, tl.load(state + GREATEST))


@triton.jit
def sample_tokens(
    logits,
    draws,
    adjusted,
    num_adjusted,
    changed,
    states,
    arrived,
    masses,
    equals,
    tokens,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST_ADJUSTED: tl.constexpr,
):
    """tokens[d] = the one at the random quantile of what is kept, in the order of ids.

    Each part leaves the weight above the cut and the number of those that equal it; the last to
    arrive finds the part that the quantile falls into, and then the token. Program (draw, part).
    """
    d = tl.program_id(0)
    part = tl.program_id(1)
    record = draws + d * 6
    state = states + d * WORDS
    if tl.load(state + AMOUNT) > 0:
        cut = tl.load(state + CUT).to(tl.uint32)
        big = tl.load(state + BIG).to(tl.int32).to(tl.float32, bitcast=True)
        t = _temperature(record)
        near = _near(record, big)
        row = (tl.load(record + 4) >> 32).to(tl.int64)
        a = place_in(adjusted, num_adjusted, d, MOST_ADJUSTED)
        i = tl.arange(0, BLOCK)
        at = part * BLOCK + i
        value = scores(logits, changed, row, a, at, V)
        order = order_of(value)
        live = (at < V) & (value >= near)
        weight = tl.where(live & (order > cut), _weight(value, big, t), 0.0).to(tl.float64)
        equal = (live & (order == cut)).to(tl.int32)
        tl.store(masses + d * PARTS + part, tl.sum(weight, 0))
        tl.store(equals + d * PARTS + part, tl.sum(equal, 0))
        tl.debug_barrier()
        before = tl.atomic_add(arrived + d, 1, sem="acq_rel", scope="gpu")
        if before == PARTS - 1:
            tl.store(arrived + d, 0)
            ties = tl.load(state + TIES).to(tl.int32)
            p = tl.arange(0, PARTS_BLOCK)
            mass = tl.load(masses + d * PARTS + p, mask=p < PARTS, other=0.0)
            same = tl.load(equals + d * PARTS + p, mask=p < PARTS, other=0)
            earlier = tl.cumsum(same, 0) - same
            taken = tl.minimum(tl.maximum(ties - earlier, 0), same)
            one = _weight(_number(cut), big, t).to(tl.float64)
            mass += tl.where(taken > 0, taken.to(tl.float64) * one, 0.0)
            sums = tl.cumsum(mass, 0)
            wanted = _uniform(record) * tl.sum(mass, 0)
            last = tl.max(tl.where(mass > 0.0, p, 0), 0)
            there = tl.min(tl.where((sums > wanted) & (mass > 0.0), p, last), 0)
            run = tl.sum(tl.where(p < there, mass, 0.0), 0)
            seen = tl.sum(tl.where(p < there, same, 0), 0)
            at = there * BLOCK + i
            value = scores(logits, changed, row, a, at, V)
            order = order_of(value)
            live = (at < V) & (value >= near)
            equal = (live & (order == cut)).to(tl.int32)
            kept = (order > cut) | ((equal > 0) & (seen + tl.cumsum(equal, 0) <= ties))
            weight = tl.where(live & kept, _weight(value, big, t), 0.0).to(tl.float64)
            reached = run + tl.cumsum(weight, 0) > wanted
            token = tl.min(tl.where(reached & (weight > 0.0), at, V), 0)
            end = tl.max(tl.where(weight > 0.0, at, -1), 0)
            end = tl.where(end < 0, tl.load(state + GREATEST).to(tl.int32), end)
            tl.store(tokens + d, tl.where(token < V, token, end))


@triton.jit
def _temperature(record):
    temperature = tl.load(record + 1).to(tl.float64, bitcast=True)
    return tl.maximum(temperature.to(tl.float32), 1.1754943508222875e-38)


@triton.jit
def _near(record, big):
    """The least logit that `min_p` keeps."""
    temperature = tl.load(record + 1).to(tl.float64, bitcast=True)
    min_p = tl.load(record + 3).to(tl.float64, bitcast=True)
    near = (big.to(tl.float64) + temperature * tl.log(min_p)).to(tl.float32)
    return tl.where(min_p > 0.0, near, LOWEST)


@triton.jit
def _weight(value, big, t):
    """How likely a logit is, as a multiple of that of the greatest."""
    return tl.exp((value - big) / t)


@triton.jit
def _whole(value, big, t, ONE: tl.constexpr):
    """A weight as an integer."""
    return (_weight(value, big, t).to(tl.float64) * ONE).to(tl.int64)


@triton.jit
def _digit(order, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    return ((order >> SHIFT) & ((1 << WIDTH) - 1)).to(tl.int32)


@triton.jit
def _number(order):
    """The float32 of that place in the order."""
    bits = tl.where((order >> 31) != 0, order ^ 0x80000000, order ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _uniform(record):
    """A number in [0, 1): the first of numpy's Philox with the key [seed, 0] and the counter
    [position, choice, 0, 0], which counts up before it draws.
    """
    seed = tl.load(record).to(tl.uint64, bitcast=True)
    word = tl.load(record + 5)
    choice = (word & 0xFFFFFFFF).to(tl.uint64, bitcast=True)
    position = ((word >> 32) & 0xFFFFFFFF).to(tl.uint64, bitcast=True)
    key0 = seed
    key1 = seed * 0
    x0 = position + 1
    x1 = choice
    x2 = seed * 0
    x3 = seed * 0
    a = tl.full((), 0xD2E7470EE14C6C93, tl.uint64)
    b = tl.full((), 0xCA5A826395121157, tl.uint64)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(a, x0)
        low0 = a * x0
        high1 = tl.umulhi(b, x2)
        low1 = b * x2
        x0 = high1 ^ x1 ^ key0
        x1 = low1
        x2 = high0 ^ x3 ^ key1
        x3 = low0
        key0 = key0 + tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
        key1 = key1 + tl.full((), 0xBB67AE8584CAA73B, tl.uint64)
    return (x0 >> 11).to(tl.float64) * 1.1102230246251565e-16
