"""What a step does beside its nodes: tokens of the step before, and copies of blocks."""

import triton
import triton.language as tl


@triton.jit
def resolve_carried(token_ids, carried, tokens_before, count, BLOCK: tl.constexpr):
    """token_ids[place] = tokens_before[draw] of each pair of `carried`; one below 0 counts as 0.

    A place below 0 is padding.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    place = tl.load(carried + at * 2, mask=live, other=-1)
    draw = tl.load(carried + at * 2 + 1, mask=live, other=0)
    live = live & (place >= 0)
    token = tl.load(tokens_before + draw, mask=live, other=0)
    tl.store(token_ids + place, tl.maximum(token, 0), mask=live)


@triton.jit
def copy_blocks(pages, pairs, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Whole blocks of PAGE words: pairs of source and destination. Program (pair, part of it).

    A pair of equal blocks copies nothing.
    """
    pair = tl.program_id(0)
    source = tl.load(pairs + pair * 2).to(tl.int64)
    target = tl.load(pairs + pair * 2 + 1).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = (at < PAGE) & (source != target)
    word = tl.load(pages + source * PAGE + at, mask=live)
    tl.store(pages + target * PAGE + at, word, mask=live)
