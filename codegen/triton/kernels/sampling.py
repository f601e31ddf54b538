"""Tokens from rows of logits, to the meaning of `runtime/sampling/sampler.py` and `adjustments.py`.

A draw is six words of 64 bits: seed, temperature, top_p, min_p, (top_k, row), (choice, position).
An adjusted draw is nine words of 32: its draw and mask, where its bias and its counts begin and
end, and three penalties.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-float("inf"))


@triton.jit
def adjust_rows(
    logits, draws, adjusted, masks, out, V: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[a, :] = the row of adjusted draw a in float32, minus infinity where its mask says no.

    NaN and infinity stay, so that they are seen. Program (a, columns).
    """
    place = tl.program_id(0)
    draw = tl.load(adjusted + place * 9)
    mask = tl.load(adjusted + place * 9 + 1)
    row = (tl.load(draws + draw * 6 + 4) >> 32).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < V
    value = tl.load(logits + row * V + at, mask=live, other=0.0).to(tl.float32)
    if mask >= 0:
        word = tl.load(masks + mask.to(tl.int64) * WORDS + at // 32, mask=live, other=0)
        allowed = ((word >> (at % 32)) & 1) != 0
        broken = (value != value) | (value == float("inf"))
        value = tl.where(allowed | broken, value, LOWEST)
    tl.store(out + place.to(tl.int64) * V + at, value, mask=live)


@triton.jit
def adjust_entries(
    draws,
    adjusted,
    bias_ids,
    bias,
    count_ids,
    counts,
    token_ids,
    logits_index,
    carried,
    num_carried,
    out,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bias and penalties of adjusted draw a in its row of `out`. Program a.

    If the token that the row belongs to is carried, the counts do not contain it yet.
    """
    place = tl.program_id(0)
    record = adjusted + place * 9
    row = out + place.to(tl.int64) * V
    i = tl.arange(0, BLOCK)
    begin = tl.load(record + 2)
    end = tl.load(record + 3)
    for first in range(begin, end, BLOCK):
        live = first + i < end
        token = tl.load(bias_ids + first + i, mask=live, other=0)
        more = tl.load(bias + first + i, mask=live, other=0.0)
        value = tl.load(row + token, mask=live, other=0.0)
        tl.store(row + token, value + more, mask=live)
    tl.debug_barrier()
    draw = tl.load(record)
    at = tl.load(logits_index + (tl.load(draws + draw * 6 + 4) >> 32))
    mine = 0
    for first in range(0, num_carried, BLOCK):
        live = first + i < num_carried
        where = tl.load(carried + (first + i) * 2, mask=live, other=-1)
        mine += tl.sum((where == at).to(tl.int32), 0)
    last = tl.where(mine > 0, tl.load(token_ids + at), -1)
    repetition = tl.load(record + 6).to(tl.float32, bitcast=True)
    frequency = tl.load(record + 7).to(tl.float32, bitcast=True)
    presence = tl.load(record + 8).to(tl.float32, bitcast=True)
    begin = tl.load(record + 4)
    end = tl.load(record + 5)
    found = 0
    for first in range(begin, end, BLOCK):
        live = first + i < end
        token = tl.load(count_ids + first + i, mask=live, other=-2)
        count = tl.load(counts + first + i, mask=live, other=0)
        again = live & (token == last)
        found += tl.sum(again.to(tl.int32), 0)
        count += again.to(tl.int32)
        value = tl.load(row + token, mask=live, other=0.0)
        value = _penalized(value, count, repetition, frequency, presence)
        tl.store(row + token, value, mask=live)
    if (last >= 0) & (found == 0):
        one = (i == 0).to(tl.int32)
        value = tl.load(row + last + i, mask=i == 0, other=0.0)
        value = _penalized(value, one, repetition, frequency, presence)
        tl.store(row + last + i, value, mask=i == 0)


@triton.jit
def _penalized(value, count, repetition, frequency, presence):
    value = tl.where(value < 0, value * repetition, tl.div_rn(value, value * 0 + repetition))
    value = value - count.to(tl.float32) * frequency
    return value - tl.where(count > 0, presence, 0.0)


@triton.jit
def row_tops(
    logits,
    draws,
    adjusted,
    num_adjusted,
    changed,
    tops,
    places,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST_ADJUSTED: tl.constexpr,
):
    """The greatest logit of each part of a draw's row and its lowest id; NaN where there is one.

    Program (draw, part).
    """
    draw = tl.program_id(0)
    part = tl.program_id(1)
    a = _place_in(adjusted, num_adjusted, draw, MOST_ADJUSTED)
    row = (tl.load(draws + draw * 6 + 4) >> 32).to(tl.int64)
    at = part * BLOCK + tl.arange(0, BLOCK)
    value = _scores(logits, changed, row, a, at, V)
    top = tl.max(value, 0)
    place = tl.min(tl.where(value == top, at, V), 0)
    broken = tl.sum((value != value).to(tl.int32), 0)
    tl.store(tops + draw * PARTS + part, tl.where(broken > 0, float("nan"), top))
    tl.store(places + draw * PARTS + part, place)


@triton.jit
def draw_tokens(
    logits,
    draws,
    adjusted,
    num_adjusted,
    changed,
    tops,
    places,
    tokens,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST_ADJUSTED: tl.constexpr,
):
    """tokens[d] = what draw d takes, -1 where its row has NaN or no finite maximum. Program d.

    Cuts are found without a sort: the least of the kept logits is built from its highest bits on,
    as an unsigned number of the same order.
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
    temperature = tl.load(record + 1).to(tl.float64, bitcast=True)
    if broken > 0:
        token = -1
    elif temperature != 0.0:
        token = _drawn(
            record, logits, adjusted, num_adjusted, changed, d, temperature, big, token,
            V, BLOCK, MOST_ADJUSTED,
        )  # fmt: skip
    tl.store(tokens + d, token)


@triton.jit
def _drawn(
    record,
    logits,
    adjusted,
    num_adjusted,
    changed,
    d,
    temperature,
    big,
    greatest,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST_ADJUSTED: tl.constexpr,
):
    top_p = tl.load(record + 2).to(tl.float64, bitcast=True)
    min_p = tl.load(record + 3).to(tl.float64, bitcast=True)
    kept_and_row = tl.load(record + 4)
    top_k = (kept_and_row & 0xFFFFFFFF).to(tl.int32)
    row = (kept_and_row >> 32).to(tl.int64)
    a = _place_in(adjusted, num_adjusted, d, MOST_ADJUSTED)
    i = tl.arange(0, BLOCK)
    t = tl.maximum(temperature.to(tl.float32), 1.1754943508222875e-38)
    need = tl.where(top_k == 0, V, tl.minimum(top_k, V))
    cut = tl.full((), 0, tl.uint32)
    ties = tl.full((), V, tl.int32)
    if need < V:
        cut, above = _cut_by_count(logits, changed, row, a, need, V, BLOCK)
        ties = need - above
    if top_p < 1.0:
        cut, ties = _cut_by_share(
            logits, changed, row, a, cut, ties, top_p, big, t, V, BLOCK
        )  # fmt: skip
    near = LOWEST + tl.zeros((), tl.float32)
    if min_p > 0.0:
        near = (big.to(tl.float64) + temperature * tl.log(min_p)).to(tl.float32)
    mass = tl.full((), 0.0, tl.float64)
    seen = tl.full((), 0, tl.int32)
    for first in range(0, V, BLOCK):
        weight, equal = _kept(logits, changed, row, a, first + i, cut, ties, seen, near, big, t, V)
        mass += tl.sum(weight, 0)
        seen += equal
    wanted = _uniform(record) * mass
    run = tl.full((), 0.0, tl.float64)
    seen = tl.full((), 0, tl.int32)
    token = tl.full((), -1, tl.int32)
    fallback = greatest
    for first in range(0, V, BLOCK):
        weight, equal = _kept(logits, changed, row, a, first + i, cut, ties, seen, near, big, t, V)
        sums = run + tl.cumsum(weight, 0)
        hit = tl.min(tl.where((sums > wanted) & (weight > 0.0), first + i, V), 0)
        end = tl.max(tl.where(weight > 0.0, first + i, -1), 0)
        fallback = tl.where(end >= 0, end, fallback)
        token = tl.where((token < 0) & (hit < V), hit, token)
        run += tl.sum(weight, 0)
        seen += equal
    return tl.where(token < 0, fallback, token)


@triton.jit
def _place_in(adjusted, num_adjusted, draw, MOST: tl.constexpr):
    """Which adjusted draw this one is; -1 for none."""
    i = tl.arange(0, MOST)
    other = tl.load(adjusted + i * 9, mask=i < num_adjusted, other=-1)
    return tl.max(tl.where(other == draw, i, -1), 0)


@triton.jit
def _scores(logits, changed, row, a, at, V: tl.constexpr):
    """Logits in float32, of the changed row where there is one; minus infinity beyond the end."""
    plain = tl.load(logits + row * V + at, mask=(at < V) & (a < 0), other=LOWEST).to(tl.float32)
    other = tl.load(changed + a.to(tl.int64) * V + at, mask=(at < V) & (a >= 0), other=LOWEST)
    return tl.where(a < 0, plain, other)


@triton.jit
def _order(x):
    """float32 as uint32 of the same order."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _number(order):
    """The float32 of that place in the order."""
    bits = tl.where((order >> 31) != 0, order ^ 0x80000000, order ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _cut_by_count(logits, changed, row, a, need, V: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest order that at least `need` logits reach, and how many lie above it."""
    i = tl.arange(0, BLOCK)
    cut = tl.full((), 0, tl.uint32)
    step = tl.full((), 0x40000000, tl.uint32)
    above = tl.full((), 0, tl.int32)
    for _ in range(0, 16):
        one = cut + step
        two = one + step
        three = two + step
        n1 = tl.full((), 0, tl.int32)
        n2 = tl.full((), 0, tl.int32)
        n3 = tl.full((), 0, tl.int32)
        for first in range(0, V, BLOCK):
            at = first + i
            order = _order(_scores(logits, changed, row, a, at, V))
            live = at < V
            n1 += tl.sum(((order >= one) & live).to(tl.int32), 0)
            n2 += tl.sum(((order >= two) & live).to(tl.int32), 0)
            n3 += tl.sum(((order >= three) & live).to(tl.int32), 0)
        above = tl.where(n3 >= need, above, tl.where(n2 >= need, n3, tl.where(n1 >= need, n2, n1)))
        cut = tl.where(n3 >= need, three, tl.where(n2 >= need, two, tl.where(n1 >= need, one, cut)))
        step = step >> 2
    return cut, above


@triton.jit
def _cut_by_share(
    logits, changed, row, a, least, ties, top_p, big, t, V: tl.constexpr, BLOCK: tl.constexpr
):
    """The cut of the shortest run of the likeliest that holds `top_p` of what was kept so far.

    `least` and `ties` are the cut so far, and how many logits equal to it are kept.
    """
    i = tl.arange(0, BLOCK)
    total = tl.full((), 0.0, tl.float64)
    for first in range(0, V, BLOCK):
        total += _mass_from(logits, changed, row, a, first + i, least + 1, big, t, V)
    equal = tl.exp((_number(least) - big) / t).to(tl.float64)
    bounded = least > 0
    total += tl.where(bounded, equal * ties.to(tl.float64), 0.0)
    wanted = top_p * total
    cut = tl.full((), 0, tl.uint32)
    step = tl.full((), 0x40000000, tl.uint32)
    above = tl.full((), 0.0, tl.float64)
    for _ in range(0, 16):
        one = cut + step
        two = one + step
        three = two + step
        m1 = tl.full((), 0.0, tl.float64)
        m2 = tl.full((), 0.0, tl.float64)
        m3 = tl.full((), 0.0, tl.float64)
        for first in range(0, V, BLOCK):
            m1 += _mass_from(logits, changed, row, a, first + i, one, big, t, V)
            m2 += _mass_from(logits, changed, row, a, first + i, two, big, t, V)
            m3 += _mass_from(logits, changed, row, a, first + i, three, big, t, V)
        ok1 = (m1 >= wanted) | (one <= least)
        ok2 = (m2 >= wanted) | (two <= least)
        ok3 = (m3 >= wanted) | (three <= least)
        above = tl.where(ok3, above, tl.where(ok2, m3, tl.where(ok1, m2, m1)))
        cut = tl.where(ok3, three, tl.where(ok2, two, tl.where(ok1, one, cut)))
        step = step >> 2
    weight = tl.exp((_number(cut) - big) / t).to(tl.float64)
    missing = tl.ceil((wanted - above) / tl.where(weight > 0.0, weight, 1.0))
    some = tl.maximum(tl.minimum(missing, 2147483647.0), 1.0).to(tl.int32)
    tighter = cut > least
    return tl.where(tighter, cut, least), tl.where(tighter, some, tl.minimum(some, ties))


@triton.jit
def _mass_from(logits, changed, row, a, at, order, big, t, V: tl.constexpr):
    """The weights of those logits that reach an order, summed in float64."""
    value = _scores(logits, changed, row, a, at, V)
    kept = (_order(value) >= order) & (at < V)
    return tl.sum(tl.where(kept, tl.exp((value - big) / t), 0.0).to(tl.float64), 0)


@triton.jit
def _kept(logits, changed, row, a, at, cut, ties, seen, near, big, t, V: tl.constexpr):
    """The weights of what is kept, in float64, and how many equal the cut. `seen` were before."""
    value = _scores(logits, changed, row, a, at, V)
    order = _order(value)
    equal = ((order == cut) & (at < V)).to(tl.int32)
    place = seen + tl.cumsum(equal, 0)
    kept = ((order > cut) | ((equal > 0) & (place <= ties))) & (value >= near) & (at < V)
    weight = tl.where(kept, tl.exp((value - big) / t), 0.0).to(tl.float64)
    return weight, tl.sum(equal, 0)


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
