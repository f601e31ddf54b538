"""What is done to rows of logits before tokens are drawn, and the greatest of their parts.

Adjustments have the meaning of `runtime/sampling/adjustments.py`.

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
    a = place_in(adjusted, num_adjusted, draw, MOST_ADJUSTED)
    row = (tl.load(draws + draw * 6 + 4) >> 32).to(tl.int64)
    at = part * BLOCK + tl.arange(0, BLOCK)
    value = scores(logits, changed, row, a, at, V)
    top = tl.max(value, 0)
    place = tl.min(tl.where(value == top, at, V), 0)
    broken = tl.sum((value != value).to(tl.int32), 0)
    tl.store(tops + draw * PARTS + part, tl.where(broken > 0, float("nan"), top))
    tl.store(places + draw * PARTS + part, place)


@triton.jit
def place_in(adjusted, num_adjusted, draw, MOST: tl.constexpr):
    """Which adjusted draw this one is; -1 for none."""
    i = tl.arange(0, MOST)
    other = tl.load(adjusted + i * 9, mask=i < num_adjusted, other=-1)
    return tl.max(tl.where(other == draw, i, -1), 0)


@triton.jit
def scores(logits, changed, row, a, at, V: tl.constexpr):
    """Logits in float32, of the changed row where there is one; minus infinity beyond the end."""
    plain = tl.load(logits + row * V + at, mask=(at < V) & (a < 0), other=LOWEST).to(tl.float32)
    other = tl.load(changed + a.to(tl.int64) * V + at, mask=(at < V) & (a >= 0), other=LOWEST)
    return tl.where(a < 0, plain, other)


@triton.jit
def order_of(x):
    """float32 as uint32 of the same order."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
