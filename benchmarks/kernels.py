"""How near the CPU kernels come to what this machine gives: bytes read, products a second.

Run: `python benchmarks/kernels.py [--target native] [--threads N]`. Ceilings are measured in the
same run, as `infc bench --machine` does. Attention of kind int8 is bf16 queries over an 8-bit
cache.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import infc.codegen.cpp.toolchain as toolchain
from infc.codegen.cpp.ceilings import KINDS as PEAKS
from infc.codegen.cpp.ceilings import Probe, build_probe
from infc.ir.targets import resolve_target

SOURCE = Path(__file__).parent / "kernels.cpp"
SHAPES = ((4864, 896), (896, 4864), (1152, 896))  # [N, K]
ROWS = (1, 2, 4, 8, 32, 512)
WEIGHT_BYTES = 256 << 20
CACHE_BYTES = 96 << 20
# Tokens, context, heads, KV heads.
ATTENTION = (
    (1, 4096, 14, 2),
    (1, 16384, 14, 2),
    (1, 16384, 7, 1),  # threads share a context
    (512, 512, 14, 2),
    (512, 4096, 14, 2),
)
KINDS = {
    "float": 4,
    "bf16": 2,
    "int8": 33 / 32,
    "int4": 17 / 32,
    "int8-token": 1,
    "int4-token": 17 / 32,
    "int6": 25 / 32,
}
"""Kinds of weights, and their bytes."""
ATTENDED = ("float", "bf16", "int8")
"""Kinds that a cache may be of."""


def main() -> None:
    """Parse the options, build, measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="native")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        call = build(Path(directory), options.target)
        report(call, build_probe(resolve_target(options.target)), options.threads)


def build(directory: Path, target_name: str) -> Callable[..., float]:
    """Compile the benchmark for a target; the result calls its functions by name."""
    target = resolve_target(target_name)
    print(f"target {target.name}")
    shutil.copytree(Path(toolchain.__file__).parent / "kernels", directory / "kernels")
    source = Path(shutil.copy(SOURCE, directory))
    toolchain.compile_library(source, directory / "kernels.so", target)
    library = ctypes.CDLL(str(directory / "kernels.so"))

    def call(name: str, *args: int) -> float:
        function = getattr(library, name)
        function.restype = ctypes.c_double
        return float(function(*(ctypes.c_int64(a) for a in args)))

    return call


def report(call: Callable[..., float], probe: Probe, threads: int) -> None:
    """Measure and print."""
    read = probe.read_rate(threads, 2 * WEIGHT_BYTES)
    peaks = [probe.product_rate(kind, threads) for kind in PEAKS]
    # Of bytes: codes of 4 bits may pass it where 16-bit sums take more products.
    peaks += peaks[-1:] * (len(KINDS) - len(peaks))
    print(f"threads {threads}: read {read / 1e9:.1f} GB/s, barrier", end=" ")
    print(f"{call('barrier_seconds', threads) * 1e6:.2f} µs")
    for kind, name in enumerate(KINDS):
        print(f"{name}: peak {peaks[kind] / 1e9:.0f} G{'' if name.startswith('int') else 'FL'}OP/s")
        for n, k in SHAPES:
            for m in ROWS:
                print(linear_line(call, threads, name, (m, n, k), read, peaks[kind]))
        for shape in ATTENTION if name in ATTENDED else ():
            print(attention_line(call, threads, name, shape))


def attention_line(
    call: Callable[..., float], threads: int, name: str, shape: tuple[int, int, int, int]
) -> str:
    """One line of the table: attention of a sequence's last tokens."""
    tokens, context, heads, kv_heads = shape
    size = 64
    # A row that decodes finds no layer's cache in the processor's.
    layer_bytes = int(context * kv_heads * 2 * size * KINDS[name])
    layers = max(1, CACHE_BYTES // layer_bytes) if tokens == 1 else 1
    seconds = call("attention_seconds", threads, list(KINDS).index(name), *shape, size, layers, 5)
    rate = tokens * (context - (tokens - 1) / 2) * heads * 4 * size / seconds
    return (
        f"  attention {tokens} rows, context {context}, {heads} heads over {kv_heads}:"
        f" {seconds * 1e6:9.1f} µs, {rate / 1e9:6.1f} GFLOP/s"
    )


def linear_line(
    call: Callable[..., float],
    threads: int,
    name: str,
    shape: tuple[int, int, int],
    read: float,
    peak: float,
) -> str:
    """One line of the table: a product of M rows by [N, K], both rates and shares of ceilings."""
    m, n, k = shape
    weight_bytes = int(n * k * KINDS[name])
    matrices = max(1, WEIGHT_BYTES // weight_bytes) if m <= 32 else 4
    kind = list(KINDS).index(name)
    seconds = call("linear_seconds", threads, kind, m, n, k, matrices, 3)
    bandwidth, rate = weight_bytes / seconds, 2 * m * n * k / seconds
    return (
        f"  linear M={m:<4} N={n:<5} K={k:<5} {seconds * 1e6:9.1f} µs"
        f"  {bandwidth / 1e9:6.1f} GB/s ({bandwidth / read:4.0%} of read)"
        f"  {rate / 1e9:6.1f} GOP/s ({rate / peak:4.0%} of peak)"
    )


if __name__ == "__main__":
    main()
