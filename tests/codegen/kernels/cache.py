"""A paged KV cache full of NaN, filled through the kernels, and attention over it in float64."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .harness import Array, Kernels, same_bits


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads H, KV heads G, head sizes D and Dv."""

    H: int
    G: int
    D: int
    Dv: int


@dataclass(frozen=True, slots=True)
class Options:
    """What an attention layer may have beside its heads."""

    window: int = 0
    softcap: float = 0.0
    sinks: Array | None = None


@dataclass(slots=True)
class Sequence:
    """One sequence: q [n, H, D], k [n, G, D], v [n, G, Dv] as elements, for all its positions."""

    q: Array
    k: Array
    v: Array

    @property
    def length(self) -> int:
        return int(self.q.shape[0])


def random_sequence(k: Kernels, rng: np.random.Generator, length: int, heads: Heads) -> Sequence:
    sizes = ((heads.H, heads.D), (heads.G, heads.D), (heads.G, heads.Dv))
    return Sequence(*(k.array(rng.standard_normal((length, *size)) * 1.5) for size in sizes))


class Cache:
    """Blocks for two layers, of which the tests use the second; each block once, in odd order."""

    def __init__(
        self, k: Kernels, heads: Heads, lengths: list[int], block_size: int, seed: int = 0
    ) -> None:
        self.k, self.heads, self.block_size = k, heads, block_size
        self.width = max(-(-n // block_size) for n in lengths) + 1
        counts = [-(-n // block_size) for n in lengths]
        order = np.random.default_rng(seed).permutation(sum(counts)) + 1
        self.tables = np.zeros((len(lengths), self.width), np.int32)
        for b, count in enumerate(counts):
            self.tables[b, :count] = order[sum(counts[:b]) :][:count]
        self.layer_elements = self.layer_size()
        self.memory = self.empty(sum(counts) + 1, 2, self.layer_elements)

    def layer_size(self) -> int:
        """Elements of one layer's part of a block."""
        return self.heads.G * (self.heads.D + self.heads.Dv) * self.block_size

    def empty(self, *shape: int) -> Array:
        """What lies in the cache before anything is written: NaN."""
        return self.k.poison(*shape)

    def view(self) -> Array:
        """The C++ KvView as the wrapper takes it."""
        size = self.memory.itemsize
        h = self.heads
        return np.array(
            [
                self.k.address(self.memory),
                2 * self.layer_elements * size,
                self.layer_elements * size,
                self.block_size,
                h.G,
                h.D,
                h.Dv,
            ],
            np.int64,
        )

    def slots(self, sequence: int, begin: int, end: int) -> Array:
        positions = np.arange(begin, end)
        blocks = self.tables[sequence, positions // self.block_size]
        result: Array = blocks * self.block_size + positions % self.block_size
        return result.astype(np.int32)

    def stored(self, sequence: int, length: int) -> tuple[Array, Array]:
        """What lies in the cache: k [length, G, D] and v [length, G, Dv]."""
        h, bs = self.heads, self.block_size
        blocks = self.memory[self.tables[sequence], 1]
        keys = blocks[:, : h.G * h.D * bs].reshape(-1, h.G, h.D, bs).transpose(0, 3, 1, 2)
        values = blocks[:, h.G * h.D * bs :].reshape(-1, h.G, bs, h.Dv).transpose(0, 2, 1, 3)
        return (
            keys.reshape(-1, h.G, h.D)[:length],
            values.reshape(-1, h.G, h.Dv)[:length],
        )


class CodeCache(Cache):
    """The same of codes, as bytes: what is not written is all ones, which as a scale is NaN."""

    def layer_size(self) -> int:
        h = self.heads
        return int(self.k.call("layer_bytes", h.G, h.D, h.Dv, self.block_size))

    def empty(self, *shape: int) -> Array:
        return np.full(shape, 0xFF, np.uint8)

    def parts(self, sequence: int, length: int) -> tuple[Array, Array, Array, Array]:
        """Codes of k and v, `[length, G, D]` and `[length, G, Dv]`, and their scales."""
        h, bs = self.heads, self.block_size
        blocks = np.ascontiguousarray(self.memory[self.tables[sequence], 1])
        sizes = np.cumsum([h.G * h.D * bs, h.G * bs * h.Dv, h.G * bs * 4])
        keys, values, key_scales, value_scales = np.split(blocks, sizes, axis=1)
        rows = keys.view(np.int8).reshape(-1, h.G, h.D, bs).transpose(0, 3, 1, 2)
        columns = values.view(np.int8).reshape(-1, h.G, bs, h.Dv).transpose(0, 2, 1, 3)
        scales = [
            np.ascontiguousarray(x).view(np.float32).reshape(-1, h.G, bs).transpose(0, 2, 1)
            for x in (key_scales, value_scales)
        ]
        everything: list[Array] = [rows.reshape(-1, h.G, h.D), columns.reshape(-1, h.G, h.Dv)]
        everything += [x.reshape(-1, h.G) for x in scales]
        k, v, ks, vs = (np.ascontiguousarray(x[:length]) for x in everything)
        return k, v, ks, vs

    def stored(self, sequence: int, length: int) -> tuple[Array, Array]:
        """What the codes stand for, in float64."""
        k, v, k_scale, v_scale = self.parts(sequence, length)
        return (
            k * k_scale.astype(np.float64)[..., None],
            v * v_scale.astype(np.float64)[..., None],
        )


def write(
    cache: Cache, sequences: list[Sequence], spans: list[tuple[int, int]], threads: int = 2
) -> None:
    """Writes positions [begin, end) of each sequence into the cache."""
    k, h = cache.k, cache.heads
    parts = list(zip(sequences, spans, strict=True))
    keys = np.concatenate([s.k[a:b] for s, (a, b) in parts])
    values = np.concatenate([s.v[a:b] for s, (a, b) in parts])
    slots = np.concatenate([cache.slots(i, a, b) for i, (a, b) in enumerate(spans)])
    with k.team(threads) as team:
        view = cache.view()
        k.call("write_kv", team, keys, h.G * h.D, values, h.G * h.Dv, slots, len(slots), view)


def attend(
    cache: Cache,
    sequences: list[Sequence],
    spans: list[tuple[int, int]],
    options: Options = Options(),
    threads: int = 2,
) -> list[Array]:
    """Attends from positions [begin, end) of each sequence; y of each, [n, H, Dv]."""
    k, h = cache.k, cache.heads
    q = np.concatenate([s.q[a:b] for s, (a, b) in zip(sequences, spans, strict=True)])
    positions = np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in spans])
    starts = np.cumsum([0, *(b - a for a, b in spans)]).astype(np.int32)
    tables = cache.tables.copy()
    if options.window:
        # Blocks that left the window of every row to come are freed: null in the table.
        for i, (a, _) in enumerate(spans):
            tables[i, : max(0, a - options.window + 1) // cache.block_size] = 0
    total = len(positions)
    y = k.poison(total, h.H, h.Dv)
    view = cache.view()
    with k.team(threads, k.call("attention_scratch", h.D, h.Dv)) as team:
        k.call(
            "attend",
            team,
            *(q, h.H * h.D, y, h.H * h.Dv),
            *(starts, positions, tables, cache.width, len(spans), total),
            *(view, h.H, h.D**-0.5, options.window, options.softcap, options.sinks),
        )
    return [y[starts[i] : starts[i + 1]].copy() for i in range(len(spans))]


def step(
    cache: Cache,
    sequences: list[Sequence],
    spans: list[tuple[int, int]],
    options: Options = Options(),
    threads: int = 2,
) -> list[Array]:
    """What a step does: writes these positions, then attends from them."""
    write(cache, sequences, spans, threads)
    return attend(cache, sequences, spans, options, threads)


def alone(
    cache_type: type[Cache], k: Kernels, s: Sequence, heads: Heads, options: Options
) -> Array:
    """The whole sequence in one step of one thread, by itself."""
    cache = cache_type(k, heads, [s.length], 16)
    return step(cache, [s], [(0, s.length)], options, threads=1)[0]


def last_row(cache: Cache, s: Sequence) -> Array:
    """The last token's heads, decoded after all before it."""
    step(cache, [s], [(0, s.length - 1)])
    y: Array = step(cache, [s], [(s.length - 1, s.length)])[0][0]
    return y


def in_pieces(
    cache: Cache,
    sequences: list[Sequence],
    rng: np.random.Generator,
    options: Options,
    threads: int,
) -> list[Array]:
    """All of each sequence in steps that give some a chunk, some one token, some nothing."""
    done = [0] * len(sequences)
    parts: list[list[Array]] = [[] for _ in sequences]
    while any(d < s.length for d, s in zip(done, sequences, strict=True)):
        takes = rng.choice([0, 1, 7, 200, 600], len(sequences))
        ends = [min(s.length, d + int(n)) for s, d, n in zip(sequences, done, takes, strict=True)]
        if ends == done:
            continue
        spans = list(zip(done, ends, strict=True))
        for part, y in zip(parts, step(cache, sequences, spans, options, threads), strict=True):
            part.append(y)
        done = ends
    return [np.concatenate(part) for part in parts]


def check_heads_that_share_keys(
    cache_type: type[Cache], k: Kernels, sizes: tuple[int, int]
) -> None:
    """Whatever heads share a KV head, each has the bits that it has alone."""
    s = random_sequence(k, np.random.default_rng(4), 90, Heads(13, 1, *sizes))

    def rows(heads: slice) -> Array:
        q = s.q[:, heads].copy()
        cache = cache_type(k, Heads(q.shape[1], 1, *sizes), [90], 16)
        return last_row(cache, Sequence(q, s.k, s.v))

    single = np.concatenate([rows(slice(head, head + 1)) for head in range(13)])
    for count in range(2, 14):
        assert same_bits(rows(slice(count)), single[:count]), count


class SplitPlan(NamedTuple):
    """What the threads share of contexts; no pieces where they take whole tiles."""

    pieces: int
    rows: int
    unit_rows: int
    slots: int


def split_plan(
    k: Kernels, heads: Heads, spans: list[tuple[int, int]], threads: int, window: int = 0
) -> SplitPlan:
    """The plan for rows at positions [begin, end) of each sequence."""
    starts = np.cumsum([0, *(b - a for a, b in spans)]).astype(np.int32)
    positions = np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in spans])
    plan = np.zeros(4, np.int64)
    shape = (len(spans), heads.G, heads.H // heads.G, window)
    k.call("split_plan", starts, positions, *shape, threads, plan)
    return SplitPlan(*plan.tolist())


SHARED = {
    "gqa": (Heads(14, 2, 64, 64), Options(), 1, 5),
    "mqa": (Heads(29, 1, 16, 16), Options(), 1, 3),
    # The first row sees nothing of the last chunk, and the second nothing of the first one.
    "window": (
        Heads(7, 1, 20, 20),
        Options(2817, 9.0, np.array([1, -1, 2, 0, 3, -3, 0], np.float32)),
        2,
        6,
    ),
}
"""Heads, options, tokens and threads that share a context of `SHARED_LENGTH` tokens."""

SHARED_LENGTH = 5121


def check_shared_context(cache_type: type[Cache], k: Kernels, case: str) -> None:
    """Threads that share a context give the bits that one thread gives."""
    heads, options, tokens, threads = SHARED[case]
    span = (SHARED_LENGTH - tokens, SHARED_LENGTH)
    assert split_plan(k, heads, [span], threads, options.window).pieces > threads
    sequence = random_sequence(k, np.random.default_rng(5), SHARED_LENGTH, heads)
    cache = cache_type(k, heads, [SHARED_LENGTH], 32)
    check_threads_change_no_bits(cache, [sequence], tokens, options, threads)


def check_threads_change_no_bits(
    cache: Cache, sequences: list[Sequence], tokens: int, options: Options, threads: int
) -> None:
    """The last tokens have the bits that one thread gives them, whatever is shared."""
    spans = [(max(0, s.length - tokens), s.length) for s in sequences]
    write(cache, sequences, [(0, s.length) for s in sequences])
    expected = attend(cache, sequences, spans, options, threads=1)
    for y, x in zip(attend(cache, sequences, spans, options, threads), expected, strict=True):
        assert same_bits(y, x)


_REFERENCES: dict[str, Array] = {}
"""Results of `reference`: every target is compared with the same ones."""


def reference(k: Kernels, s: Sequence, heads: Heads, options: Options = Options()) -> Array:
    """Causal attention of a whole sequence in float64."""
    q, keys, values = (k.values(x) for x in (s.q, s.k, s.v))
    digest = hashlib.sha256(repr((heads, options)).encode())
    for part in (q, keys, values):
        digest.update(part.tobytes())
    key = digest.hexdigest()
    if key not in _REFERENCES:
        _REFERENCES[key] = _attention(q, keys, values, heads, options)
    return _REFERENCES[key]


def _attention(q: Array, keys: Array, values: Array, heads: Heads, options: Options) -> Array:
    """Of q [T, H, D], keys [T, G, D] and values [T, G, Dv]: [T, H, Dv]."""
    share = heads.H // heads.G
    by_head = (x.transpose(1, 0, 2) for x in (q, keys.repeat(share, 1), values.repeat(share, 1)))
    q, keys, values = by_head
    scores = q @ keys.transpose(0, 2, 1) * heads.D**-0.5
    if options.softcap:
        scores = np.tanh(scores / options.softcap) * options.softcap
    t, p = np.indices(scores.shape[1:])
    seen = p <= t
    if options.window:
        seen &= p > t - options.window
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    if options.sinks is not None:
        top = np.maximum(top, options.sinks[:, None, None])
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if options.sinks is not None:
        total = total + np.exp(options.sinks[:, None, None].astype(np.float64) - top)
    result: Array = (weights / total @ values).transpose(1, 0, 2)
    return result
