"""Packed panels: how the kernels read the weight of a matrix product.

A weight `[N, K]` lies as `[ceil(N / nr)][ceil(K / kp)][nr][kp]`, zero padded: a panel holds `nr`
outputs, and for each step of K the `nr * kp` numbers that the kernel multiplies at once. Codes of
grouped formats lie in the same order by groups, with the scales of each group in front.
The kernels have the same sizes as constants (`LinearLayout` in `kernels/linear*_tile.hpp`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...ir.formats import Format, Part
from ...ir.program import Attr
from ...ir.targets import Target
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
class BlockLayout:
    """Panels of `nr` outputs for a grouped format (`ir/formats.py`), group after group of K.

    Of each group come first the scales of the outputs `[nr]`, then their minima if the format has
    them, then the codes: for every 32 elements, `[32 / kp][nr][kp]` bytes of 8-bit codes (`flipped`
    as in `PanelLayout`), or `[16 / 4][nr][4]` bytes of two 4-bit codes each. What one instruction
    multiplies by neighboring elements of K lies side by side. Of codes of 6 bits, 16 lie after the
    other as `[nr / 16][3][16][4]` bytes: for 16 outputs four with the upper bits, then eight.
    """

    nr: int
    format: Format
    kp: int = 4
    flipped: bool = False

    def attrs(self) -> dict[str, Attr]:
        """The constants of the weight expression `pack`."""
        sizes: dict[str, Attr] = {"nr": self.nr, "format": self.format.name}
        if self.format.bits == 8:
            sizes["kp"] = self.kp
        return sizes | {"flipped": True} if self.flipped else sizes

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`[.., N, blocks * block_bytes]` → `[.., ceil(N / nr), blocks, nr * block_bytes]`."""
        *lead, n, width = shape
        size = self.format.block_bytes
        return (*lead, -(-n // self.nr), width // size, self.nr * size)

    def packed_type(self, plain: TensorType) -> TensorType:
        """The type of a packed weight; `plain` has rank 2 or more and integer dimensions."""
        shape = tuple(int(str(dim)) for dim in plain.shape)
        return TensorType(plain.dtype, self.packed_shape(shape))

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor of `packed_shape(weight.shape)`; leading dimensions are kept."""
        import torch

        return torch.from_numpy(self.pack_array(weight.numpy()))

    def pack_array(self, codes: NDArray[Any]) -> NDArray[Any]:
        """The same with numpy. Outputs that pad the last panel have scales of 0."""
        *lead, n, width = codes.shape
        panels, groups, _ = self.packed_shape((n, width))
        padded = codes
        if n != panels * self.nr:
            padded = np.zeros((*lead, panels * self.nr, width), codes.dtype)
            padded[..., :n, :] = codes
        rows = padded.reshape(*lead, panels, self.nr, groups, -1).swapaxes(-3, -2)
        return np.concatenate([self._lay(rows, part) for part in self.format.parts], -1)

    def _lay(self, rows: NDArray[Any], part: Part) -> NDArray[Any]:
        """The bytes of a part of blocks `[.., nr, block_bytes]`, in the order of the panel."""
        data = rows[..., part.offset : part.offset + part.num_bytes]
        if part.name == "codes":
            data = data ^ 128 if self.flipped else data
            if self.format.bits == 6:
                units = data.reshape(*data.shape[:-2], self.nr // 16, 16, -1, 3, 4)
                order = np.moveaxis(units, -3, -5).swapaxes(-3, -2)
                return order.reshape(*data.shape[:-2], -1)
            steps = data.reshape(*data.shape[:-1], -1, self.kp)
            data = steps.swapaxes(-3, -2)
            return data.reshape(*data.shape[:-3], -1)
        return data.reshape(*data.shape[:-2], -1)

    def unpack_array(self, packed: NDArray[Any], n: int) -> NDArray[Any]:
        """The inverse of `pack_array` for `n` outputs."""
        *lead, panels, groups, _ = packed.shape
        found, start = [], 0
        for part in self.format.parts:
            data = packed[..., start : start + self.nr * part.num_bytes]
            start += self.nr * part.num_bytes
            if part.name == "codes" and self.format.bits == 6:
                units = data.reshape(*data.shape[:-1], -1, self.nr // 16, 3, 16, 4)
                data = np.moveaxis(units.swapaxes(-3, -2), -5, -3)
            elif part.name == "codes":
                steps = data.reshape(*data.shape[:-1], -1, self.nr, self.kp).swapaxes(-3, -2)
                data = steps ^ 128 if self.flipped else steps
            found.append(data.reshape(*lead, panels, groups, self.nr, part.num_bytes))
        plain = np.concatenate(found, -1).swapaxes(-3, -2)
        rows = plain.reshape(*lead, panels * self.nr, groups * self.format.block_bytes)
        return np.ascontiguousarray(rows[..., :n, :])


Layout = PanelLayout | BlockLayout


def weight_layout(form: DType | Format, target: Target) -> Layout:
    """The layout of a weight of a plain element type, or of codes in a format."""
    if isinstance(form, DType):
        return panel_layout(form, target)
    if form.group == 1:
        return panel_layout(DType.I8, target)
    plain = panel_layout(DType.I8, target)
    if form.bits != 8:
        return BlockLayout(plain.nr, form)
    return BlockLayout(plain.nr, form, plain.kp, plain.flipped)


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
