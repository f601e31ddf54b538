"""Packed panels: how the kernels read the weight of a matrix product.

A weight `[N, K]` lies as `[ceil(N / nr)][ceil(K / kp)][nr][kp]`, zero padded: a panel holds `nr`
outputs, and for each step of K the `nr * kp` numbers that the kernel multiplies at once. Codes of
4 bits lie in the same order by groups, each group's multipliers in front.
The kernels have the same sizes as constants (`LinearLayout` in `kernels/linear*_tile.hpp`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...ir.program import Attr
from ...ir.rounding import GROUP_I4_BYTES
from ...ir.target import Target
from ...ir.types import DType, TensorType

if TYPE_CHECKING:
    import torch

_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")


@dataclass(frozen=True, slots=True)
class PanelLayout:
    """Sizes of a panel: `nr` outputs, `kp` neighbours in K side by side.

    `flipped` panels hold int8 codes as unsigned bytes, code + 128 (so 128 stands in the padding):
    what the instruction `vpdpbusd` multiplies.
    """

    nr: int
    kp: int
    flipped: bool = False

    def attrs(self) -> dict[str, Attr]:
        """The constants of the weight expression `pack`."""
        sizes: dict[str, Attr] = {"nr": self.nr, "kp": self.kp}
        return sizes | {"flipped": True} if self.flipped else sizes

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`[.., N, K]` → `[.., ceil(N / nr), ceil(K / kp), nr, kp]`."""
        *lead, n, k = shape
        return (*lead, -(-n // self.nr), -(-k // self.kp), self.nr, self.kp)

    def packed_type(self, plain: TensorType) -> TensorType:
        """The type of a packed weight; `plain` has rank 2 or more and integer dimensions."""
        shape = tuple(int(str(dim)) for dim in plain.shape)
        return TensorType(plain.dtype, self.packed_shape(shape))

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor of `packed_shape(weight.shape)`; leading dimensions are kept."""
        *lead, n, k = weight.shape
        panels, steps, nr, kp = self.packed_shape((n, k))
        padded = weight
        if (n, k) != (panels * nr, steps * kp):
            padded = weight.new_zeros((*lead, panels * nr, steps * kp))
            padded[..., :n, :k] = weight
        tiles = padded.reshape(*lead, panels, nr, steps, kp).transpose(-3, -2).contiguous()
        return self._flip(tiles)

    def unpack(self, packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
        """The inverse of `pack` for a weight `[.., n, k]`."""
        *lead, panels, steps, nr, kp = packed.shape
        rows = packed.transpose(-3, -2).reshape(*lead, panels * nr, steps * kp)
        return self._flip(rows[..., :n, :k].contiguous())

    def _flip(self, codes: torch.Tensor) -> torch.Tensor:
        """Add 128 to bytes that are kept signed, or take it off: both turn the upper bit over."""
        return codes ^ -128 if self.flipped else codes


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """Panels of `nr` outputs for codes of 4 bits in groups (`ir/rounding.py`).

    Of each group come first the outputs' multipliers `[nr]`, then the bytes of codes as
    `[16 / 4][nr][4]`: what one instruction multiplies by four elements lies side by side.
    """

    nr: int

    def attrs(self) -> dict[str, Attr]:
        """The constants of the weight expression `pack`."""
        return {"nr": self.nr, "group_bytes": GROUP_I4_BYTES}

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`[.., N, groups * 17]` → `[.., ceil(N / nr), groups, nr * 17]`."""
        *lead, n, width = shape
        return (*lead, -(-n // self.nr), width // GROUP_I4_BYTES, self.nr * GROUP_I4_BYTES)

    def packed_type(self, plain: TensorType) -> TensorType:
        """The type of a packed weight; `plain` has rank 2 or more and integer dimensions."""
        shape = tuple(int(str(dim)) for dim in plain.shape)
        return TensorType(plain.dtype, self.packed_shape(shape))

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor of `packed_shape(weight.shape)`; leading dimensions are kept."""
        import torch

        return torch.from_numpy(self.pack_array(weight.numpy()))

    def pack_array(self, codes: NDArray[Any]) -> NDArray[Any]:
        """The same with numpy. Outputs that pad the last panel have multipliers of 0."""
        *lead, n, width = codes.shape
        panels, groups, _ = self.packed_shape((n, width))
        padded = codes
        if n != panels * self.nr:
            padded = np.zeros((*lead, panels * self.nr, width), codes.dtype)
            padded[..., :n, :] = codes
        rows = padded.reshape(*lead, panels, self.nr, groups, GROUP_I4_BYTES).swapaxes(-3, -2)
        quads = rows[..., 1:].reshape(*lead, panels, groups, self.nr, -1, 4).swapaxes(-3, -2)
        codes_of = quads.reshape(*lead, panels, groups, -1)
        return np.ascontiguousarray(np.concatenate([rows[..., 0], codes_of], -1))

    def unpack_array(self, packed: NDArray[Any], n: int) -> NDArray[Any]:
        """The inverse of `pack_array` for `n` outputs."""
        *lead, panels, groups, _ = packed.shape
        quads = packed[..., self.nr :].reshape(*lead, panels, groups, -1, self.nr, 4)
        codes = quads.swapaxes(-3, -2).reshape(*lead, panels, groups, self.nr, -1)
        rows = np.concatenate([packed[..., : self.nr, None], codes], -1).swapaxes(-3, -2)
        plain = rows.reshape(*lead, panels * self.nr, groups * GROUP_I4_BYTES)
        return np.ascontiguousarray(plain[..., :n, :])


Layout = PanelLayout | GroupLayout


def weight_layout(dtype: DType, target: Target) -> Layout:
    """The layout of a weight in the type it is stored in; bytes are codes of 4 bits."""
    if dtype is DType.U8:
        return GroupLayout(nr=64 if _is_wide(target) else 16)
    return panel_layout(dtype, target)


def panel_layout(dtype: DType, target: Target) -> PanelLayout:
    """The layout of plain numbers or int8 codes that this target's kernels are compiled for."""
    wide = _is_wide(target)
    if dtype is DType.I8:
        vnni = wide and target.has("vnni")
        return PanelLayout(nr=64 if wide else 16, kp=4 if vnni else 2, flipped=vnni)
    pairs = dtype is DType.BF16 and wide and target.has("bf16")
    return PanelLayout(nr=64 if wide else 16, kp=2 if pairs else 1)


def _is_wide(target: Target) -> bool:
    return all(target.has(feature) for feature in _AVX512)
