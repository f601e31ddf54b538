"""Matrices to codes in compiled code: bit for bit what the schemes say, and much faster."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ...ir.errors import InfcError
from ...ir.machine import available_cpus
from ...ir.schemes import SCHEMES, FeedbackCode, Quantizer, get_scheme
from ...ir.targets import resolve_target
from ...ir.torch_types import to_torch
from .toolchain import LibraryBuild

if TYPE_CHECKING:
    import torch

SOURCE = Path(__file__).parent / "quantizer" / "quantize.cpp"
NOT_COMPILED = "matrices are quantized without compiled code, which takes longer"
_COMPILED = frozenset({"i8", "i4_g32", "i8_g32", "i6_g32", "b4_g32", "b4_g64", "b4_g128"})
"""Formats that `quantize.cpp` rounds to."""
_FED: Final = frozenset({"i8_g32", "i6_g32", "b4_g32", "b4_g64", "b4_g128"})
"""Those that it rounds to by error feedback too."""
_PART_ELEMENTS = 1 << 20
"""Weights that a thread takes at a time: some milliseconds of work."""


@contextlib.contextmanager
def compiled_quantizers(log: Callable[[str], None]) -> Iterator[Quantizers]:
    """The quantisers, compiled for this machine beside whatever is done until they are used.

    `log` is told where they cannot be used, and the schemes do the work instead.
    """
    with tempfile.TemporaryDirectory(prefix="infc-quantizers-") as place:
        for path in SOURCE.parent.glob("*.[ch]pp"):
            shutil.copy(path, place)
        source = Path(place) / SOURCE.name
        library = source.with_suffix(".so")
        with LibraryBuild(source, library, resolve_target("native")) as build:
            yield Quantizers(build, library, log)


class Quantizers:
    """Quantisers by scheme, over one library that is perhaps being compiled still.

    A matrix of float32 or bfloat16 is cut into rows that threads take in turn; each row is
    computed alone, so neither threads nor cuts show in the result. Anything else, and a matrix with
    NaN or infinity, is left to the scheme itself.
    """

    def __init__(self, build: LibraryBuild, library: Path, log: Callable[[str], None]) -> None:
        self._build = build
        self._path = library
        self._log = log
        self._library: ctypes.CDLL | None = None
        self._is_missing = False

    def table(self) -> dict[str, Quantizer]:
        """Quantisers by the names of schemes, for those whose format there is compiled code for."""
        return {
            name: _Bound(self, name)
            for name, scheme in SCHEMES.items()
            if scheme.weight.name in _COMPILED
        }

    def feedback(self) -> dict[str, FeedbackCode]:
        """Error feedback by the names of schemes, for those that there is compiled code for."""
        return {
            name: partial(self.feed_back, name)
            for name, scheme in SCHEMES.items()
            if scheme.weight.name in _FED
        }

    def feed_back(
        self,
        scheme: str,
        rows: torch.Tensor,
        scales: torch.Tensor,
        upper: torch.Tensor,
        d: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Codes of finite rows `[N, K]` (float32) with scales `[N]`, by error feedback.

        `upper` `[K, K]` and `d` `[K]` are the factor of the Hessian. The second tensor, `[N]` in
        float64, has the squared norm over its inputs of each row's error. None where the library
        cannot be used.
        """
        import torch

        if not self._is_there():
            return None
        form = get_scheme(scheme).weight
        count, depth = rows.shape
        codes = torch.empty((count, -(-depth // form.group) * form.block_bytes), dtype=torch.uint8)
        norms = torch.empty(count, dtype=torch.float64)
        rows, *given = (one.contiguous() for one in (rows, upper, d, scales))
        getattr(self._open(), f"feed_back_{form.name}")(
            ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_int64(count),
            ctypes.c_int64(depth),
            *(ctypes.c_void_p(one.data_ptr()) for one in (*given, codes, norms)),
        )
        return codes, norms

    def quantize(self, scheme: str, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of a matrix, as `Scheme.quantize` makes them."""
        import torch

        plain = get_scheme(scheme)
        depth = matrix.shape[-1]
        if matrix.dtype not in (torch.float32, torch.bfloat16) or not matrix.numel():
            return plain.quantize(matrix)
        width = -(-depth // plain.weight.group) * plain.weight.block_bytes
        rows = matrix.contiguous().reshape(-1, depth)
        codes = torch.empty((rows.shape[0], width), dtype=to_torch(plain.weight.code_dtype))
        scales = torch.empty(rows.shape[0], dtype=torch.float32)
        if not self._is_there() or not self._run(scheme, rows, codes, scales):
            return plain.quantize(matrix)
        return codes.reshape(*matrix.shape[:-1], width), scales.reshape(matrix.shape[:-1])

    def _run(
        self, scheme: str, rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
    ) -> bool:
        """Whether all rows were finite, and are codes now."""
        import torch

        function = getattr(self._open(), f"quantize_{get_scheme(scheme).weight.name}")
        narrow = int(rows.dtype == torch.bfloat16)
        count, depth = rows.shape
        step = max(1, _PART_ELEMENTS // depth)

        def part(first: int) -> bool:
            done: int = function(
                ctypes.c_void_p(rows.data_ptr() + first * depth * rows.element_size()),
                ctypes.c_int32(narrow),
                ctypes.c_int64(min(step, count - first)),
                ctypes.c_int64(depth),
                ctypes.c_void_p(codes.data_ptr() + first * codes.shape[1]),
                ctypes.c_void_p(scales.data_ptr() + first * scales.element_size()),
            )
            return bool(done)

        starts = range(0, count, step)
        if len(starts) == 1:
            return part(0)
        with ThreadPoolExecutor(min(available_cpus(), len(starts))) as pool:
            return all(pool.map(part, starts))

    def _is_there(self) -> bool:
        """Whether the library was compiled and can be loaded, which takes a place that allows it.

        The schemes themselves give the same codes, in more time.
        """
        if not self._is_missing:
            try:
                self._open()
            except (OSError, InfcError) as error:
                self._is_missing = True
                self._log(f"{NOT_COMPILED}: {error}")
        return not self._is_missing

    def _open(self) -> ctypes.CDLL:
        if self._library is None:
            self._build.wait()
            self._library = ctypes.CDLL(str(self._path))
        return self._library


@dataclass(frozen=True, slots=True)
class _Bound:
    """One scheme's quantiser."""

    quantizers: Quantizers
    scheme: str

    def __call__(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.quantizers.quantize(self.scheme, matrix)
