"""This machine at its limits: bytes read and products a second, by code built as a step is."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ...ir.errors import CapacityError
from ...ir.targets import Target
from .toolchain import compile_library

SOURCE = Path(__file__).parent / "probe" / "ceilings.cpp"
KERNELS = Path(__file__).parent / "kernels"
KINDS = ("fp32", "bf16", "int8")
"""What is multiplied, in the order in which the probe numbers them."""
PRODUCTS = 10_000_000
"""Instructions that each thread issues in a round: some milliseconds, shorter than a time slice."""
PRODUCT_ROUNDS, READ_ROUNDS = 80, 8


@dataclass(frozen=True, slots=True)
class Probe:
    """The library that measures, for one target. Rates are the best of several rounds."""

    library: ctypes.CDLL

    def read_rate(self, threads: int, num_bytes: int, rounds: int = READ_ROUNDS) -> float:
        """Bytes a second that the threads read together; CapacityError without the memory."""
        rate = self._call("read_rate", threads, num_bytes, rounds)
        if not rate:
            raise CapacityError(f"there are not {num_bytes / 2**20:.0f} MiB of memory to read")
        return rate

    def product_rate(
        self, kind: str, threads: int, products: int = PRODUCTS, rounds: int = PRODUCT_ROUNDS
    ) -> float:
        """Operations a second of one of KINDS, all threads together."""
        return self._call("product_rate", threads, KINDS.index(kind), products, rounds)

    def _call(self, name: str, *args: int) -> float:
        function = getattr(self.library, name)
        function.restype = ctypes.c_double
        return float(function(*(ctypes.c_int64(arg) for arg in args)))


def build_probe(target: Target) -> Probe:
    """Compile the probe for a target that this machine has; ToolchainError where it cannot be."""
    with tempfile.TemporaryDirectory(prefix="infc-probe-") as place:
        directory = Path(place)
        shutil.copytree(KERNELS, directory / "kernels")
        source = Path(shutil.copy(SOURCE, directory))
        compile_library(source, directory / "probe.so", target)
        return Probe(ctypes.CDLL(str(directory / "probe.so")))
