"""What this machine can do at best, measured in the run that quotes it: read bandwidth."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import subprocess
import tempfile
import time
from pathlib import Path

_SOURCE = """
#include <immintrin.h>
#include <stdint.h>
#include <stddef.h>
#include <pthread.h>
// Four streams a quarter apart with prefetch 2 KB ahead: plain loops reach less.
static void sum(const char* p, size_t n, float* out) {
  typedef float v16 __attribute__((vector_size(64), aligned(4)));
  v16 a = {0}, b = {0}, c = {0}, d = {0};
  const size_t q = n / 4 / 64 * 64;
  for (size_t i = 0; i < q; i += 64) {
    __builtin_prefetch(p + i + 2048); __builtin_prefetch(p + q + i + 2048);
    __builtin_prefetch(p + 2 * q + i + 2048); __builtin_prefetch(p + 3 * q + i + 2048);
    a += *(const v16*)(p + i); b += *(const v16*)(p + q + i);
    c += *(const v16*)(p + 2 * q + i); d += *(const v16*)(p + 3 * q + i);
  }
  a += b + c + d; *out = a[0];
}
struct job { const char* p; size_t n; float out; };
static void* run(void* x) { struct job* j = (struct job*)x; sum(j->p, j->n, &j->out); return 0; }
float read_all(const char* p, size_t n, int threads) {
  pthread_t t[64]; struct job j[64]; float s = 0;
  for (int i = 0; i < threads; ++i) {
    j[i].p = p + n / threads * i; j[i].n = n / threads;
    pthread_create(&t[i], 0, run, &j[i]);
  }
  for (int i = 0; i < threads; ++i) { pthread_join(t[i], 0); s += j[i].out; }
  return s;
}
"""


class ReadBandwidth:
    """Reads `num_bytes` of anonymous memory with `threads` threads; call it for GB/s."""

    def __init__(self, num_bytes: int, threads: int) -> None:
        self._directory = tempfile.TemporaryDirectory()
        source = Path(self._directory.name) / "read.c"
        source.write_text(_SOURCE, encoding="utf-8")
        library = source.with_suffix(".so")
        subprocess.run(
            ["cc", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", source, "-o", library],
            check=True,
        )
        self._read = ctypes.CDLL(str(library)).read_all
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._read.restype = ctypes.c_float
        self._memory = mmap.mmap(-1, num_bytes)
        # Huge pages raise what two cores can read by half on some machines.
        with contextlib.suppress(OSError, AttributeError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        for i in range(0, num_bytes, 4096):
            self._memory[i] = 1
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._bytes, self._threads = num_bytes, threads

    def __call__(self) -> float:
        """One read of it all, in GB/s."""
        start = time.perf_counter()
        self._read(self._address, self._bytes, self._threads)
        return self._bytes / (time.perf_counter() - start) / 1e9
