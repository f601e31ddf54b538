"""Formats: how matrices are stored in few bits, as data that every backend reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .e4m3 import E4M3_LEVELS
from .errors import ProgramError
from .types import Dim, DType, TensorType

if TYPE_CHECKING:
    import torch

CHUNK: Final = 32
"""Elements of K that are multiplied and summed together: a group has one or more of them."""

CENTERED_I4: Final = tuple(range(-8, 8))
"""Levels of 4-bit codes that are numbers around zero."""
CENTERED_I6: Final = tuple(range(-32, 32))
"""Levels of 6-bit codes that are numbers around zero."""
COUNTED_I4: Final = tuple(range(16))
"""Levels of 4-bit codes that are counted from the minimum of their group."""
BOOK_I4: Final = (-63, -52, -41, -32, -24, -17, -11, -5, 0, 6, 12, 19, 26, 34, 44, 56)
"""Levels of 4-bit codes that are denser around zero, like the weights of trained models.

They are the levels of llama.cpp's IQ4_NL, halved, so that a level plus 64 is an unsigned number of
7 bits: two products of such a number with a signed byte fit into 16 bits.
"""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a block: `count` values of a type, or bytes of codes with fewer than 8 bits."""

    name: str
    dtype: DType
    count: int
    offset: int
    """Bytes from the start of the block."""

    @property
    def num_bytes(self) -> int:
        """The bytes of the part."""
        return self.count * self.dtype.size_bytes


@dataclass(frozen=True, slots=True)
class Format:
    """How a matrix `[.., N, K]` is stored: a tensor of codes, and a float32 scale for each row.

    A weight is `row scale * (scale * level + minimum)`, where `level` is `levels[code]`, or the
    code itself if there are no `levels`. In a grouped format, every `group` weights of a row are
    one block of bytes: their scale (`DType.I8`, a multiplier from -127 to 127, or `DType.F16`),
    their minimum if the format has one, and their codes. In each 16 bytes of 4-bit codes, which are
    32 codes, byte i holds code i in its lower half and code i + 16 in its upper half, as in GGUF.
    16 codes of 6 bits are 12 bytes: byte i of the first 4 holds the upper two bits of codes i,
    i + 4, i + 8 and i + 12, those of the first in its lowest bits, and byte i of the other 8 holds
    the lower four bits of code i in its lower half, and of code i + 8 in its upper half.
    The last block of a row is padded with zeros.

    A format that is not grouped has plain codes `[.., N, K]` and no scale but that of the row. With
    a `tile`, it has one for each square of as many rows and columns instead.

    `group` is a multiple of `CHUNK` if the format is grouped, else 1.
    """

    name: str
    bits: int
    levels: tuple[float, ...] = ()
    scale: DType | None = None
    minimum: DType | None = None
    group: int = CHUNK
    tile: int = 0
    doc: str = ""

    def __post_init__(self) -> None:
        """ProgramError for what no code here can pack or round."""
        if not self.is_grouped and self.bits == 8:
            return
        if self.bits == 8 and not self.levels:
            return
        levels = [level for level in self.levels if abs(level) < 128 and level == int(level)]
        count = len(self.levels)
        is_packed = self.is_grouped and self.bits in (4, 6) and len(levels) == count
        is_packed &= count == 1 << self.bits
        if not is_packed or levels != sorted(set(levels)):
            raise ProgramError(
                f"a format {self.name} of {self.bits} bits cannot be stored",
                hint="grouped codes have 8 bits and no levels, or 4 or 6 bits and 16 or 64 whole"
                " levels below 128 in ascending order; others have 8 bits",
            )

    @property
    def is_grouped(self) -> bool:
        """Whether codes lie in blocks, with a scale in each."""
        return self.scale is not None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of a block, in the order of their bytes."""
        if self.scale is None:
            return (Part("codes", self.code_dtype, 1, 0),)
        parts: list[Part] = []
        count = self.group * self.bits // 8
        codes = (DType.I8 if self.bits == 8 else DType.U8, count)
        single = (("scale", self.scale, 1), ("minimum", self.minimum, 1), ("codes", *codes))
        offset = 0
        for name, dtype, count in single:
            if dtype is not None:
                parts.append(Part(name, dtype, count, offset))
                offset += parts[-1].num_bytes
        return tuple(parts)

    def part(self, name: str) -> Part:
        """The part of that name; KeyError if the format does not have it."""
        return {part.name: part for part in self.parts}[name]

    @property
    def block_bytes(self) -> int:
        """The bytes of a block."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def code_dtype(self) -> DType:
        """The element type of the tensor of codes: bytes of blocks, or plain codes."""
        return DType.U8 if self.is_grouped or self.levels else DType.I8

    def code_type(self, plain: TensorType) -> TensorType:
        """The type of the codes of a matrix `[.., N, K]`."""
        depth = plain.shape[-1]
        if not isinstance(depth, int):
            raise ProgramError(f"a matrix {plain} has no fixed depth")
        width: Dim = -(-depth // self.group) * self.block_bytes
        return TensorType(self.code_dtype, (*plain.shape[:-1], width))

    def scale_type(self, plain: TensorType) -> TensorType:
        """The type of the scales of its rows, `[.., N]`, or of its tiles, `[.., n, k]`."""
        if not self.tile:
            return TensorType(DType.F32, plain.shape[:-1])
        *lead, rows, depth = plain.shape
        if not isinstance(rows, int) or not isinstance(depth, int):
            raise ProgramError(f"a matrix {plain} has no fixed number of tiles")
        return TensorType(DType.F32, (*lead, -(-rows // self.tile), -(-depth // self.tile)))

    def split(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of codes `[.., N, width]`, by name, each as `[.., N, blocks, count]`."""
        from .torch_types import to_torch

        blocks = codes.reshape(*codes.shape[:-1], -1, self.block_bytes)
        found = {}
        for part in self.parts:
            data = blocks[..., part.offset : part.offset + part.num_bytes].contiguous()
            found[part.name] = data.view(to_torch(part.dtype))
        return found

    def code_levels(self, codes: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The levels of a part of codes `[.., count]`: `[.., group]` in grouped formats.

        In int8 (without `levels`: the codes themselves; of 8 bits with levels: float32), or as a
        new tensor in another type.
        """
        import torch

        if not self.levels:
            return codes if dtype is None else codes.to(dtype)
        if self.bits == 8:
            levels = torch.tensor(self.levels, dtype=dtype or torch.float32)
            return levels.index_select(0, codes.flatten().int()).view(codes.shape)
        numbers = self._numbers(codes)
        levels = torch.tensor(self.levels, dtype=dtype or torch.int8)
        return levels.index_select(0, numbers.flatten().int()).view(numbers.shape)

    def _numbers(self, codes: torch.Tensor) -> torch.Tensor:
        """The codes of 4 or 6 bits, one in each element."""
        import torch

        if self.bits == 4:
            chunks = codes.unflatten(-1, (-1, CHUNK // 2))
            return torch.cat([chunks & 15, chunks >> 4], -1).flatten(-2)
        upper, lower = codes.unflatten(-1, (-1, 12)).split([4, 8], -1)
        upper = torch.cat([(upper >> shift) & 3 for shift in (0, 2, 4, 6)], -1)
        return (torch.cat([lower & 15, lower >> 4], -1) | (upper << 4)).flatten(-2)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, depth: int) -> torch.Tensor:
        """The matrix `[.., N, depth]` that codes and scales stand for, in the type of the scales.

        Every operation is rounded on its own: the scale of a group times the level, plus the
        minimum, times the scale of the row or tile.
        """
        if self.tile:
            rows = scales.repeat_interleave(self.tile, -2)[..., : codes.shape[-2], :]
            return self._scaled(self._units(codes, scales.dtype, depth), rows)
        return self._scaled(self._units(codes, scales.dtype, depth), scales)

    def decode_rows(
        self, codes: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor, depth: int
    ) -> torch.Tensor:
        """Rows `[..]` of the matrix `[N, depth]` that `decode` gives, and nothing else."""
        values = self._units(codes[rows], scales.dtype, depth)
        return self._scaled(values, scales[rows // self.tile if self.tile else rows])

    def _scaled(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Rows `[.., K]` times their scales `[..]`, or those of each tile `[.., k]`, in place."""
        if not self.tile:
            return values.mul_(scales[..., None])
        for place, part in enumerate(values.split(self.tile, -1)):
            part.mul_(scales[..., place, None])
        return values

    def _units(self, codes: torch.Tensor, dtype: torch.dtype, depth: int) -> torch.Tensor:
        """Rows `[.., depth]` in units of their scales: a new tensor."""
        parts = self.split(codes)
        values = self.code_levels(parts["codes"], dtype)
        if "scale" in parts:
            values.mul_(parts["scale"].to(dtype))
        if "minimum" in parts:
            values.add_(parts["minimum"].to(dtype))
        return values.flatten(-2)[..., :depth]


I8: Final = Format("i8", 8, group=1, doc="int8, one float32 scale for each row")
I8_G32: Final = Format(
    "i8_g32",
    8,
    scale=DType.I8,
    doc="int8 in groups of 32, each with a multiplier of 8 bits, and one float32 scale per row",
)
Q8_0: Final = Format(
    "q8_0", 8, scale=DType.F16, doc="int8 in groups of 32, each with a float16 scale (GGUF's Q8_0)"
)
I4_G32: Final = Format(
    "i4_g32",
    4,
    CENTERED_I4,
    DType.I8,
    doc="4-bit numbers in groups of 32, each with a multiplier of 8 bits, and one float32 scale "
    "per row (the progressive groups of QServe, Lin et al. 2024)",
)


def _book_format(group: int) -> Format:
    return Format(
        f"b4_g{group}",
        4,
        BOOK_I4,
        DType.I8,
        group=group,
        doc=f"4-bit codes of 16 levels that are denser around zero, in groups of {group}, each "
        "with a multiplier of 8 bits, and one float32 scale for each row",
    )


I6_G32: Final = Format(
    "i6_g32",
    6,
    CENTERED_I6,
    DType.I8,
    doc="6-bit numbers in groups of 32, each with a multiplier of 8 bits, and one float32 scale "
    "per row",
)
B4_G32: Final = _book_format(32)
B4_G64: Final = _book_format(64)
B4_G128: Final = _book_format(128)
Q4_0: Final = Format(
    "q4_0",
    4,
    CENTERED_I4,
    DType.F16,
    doc="4-bit numbers in groups of 32, each with a float16 scale (GGUF's Q4_0)",
)
Q4_1: Final = Format(
    "q4_1",
    4,
    COUNTED_I4,
    DType.F16,
    DType.F16,
    doc="4-bit numbers in groups of 32, each with a float16 scale and minimum (GGUF's Q4_1)",
)

E4M3: Final = Format("e4m3", 8, E4M3_LEVELS, group=1, doc="e4m3, one float32 scale for each row")
E4M3_B128: Final = Format(
    "e4m3_b128",
    8,
    E4M3_LEVELS,
    group=1,
    tile=128,
    doc="e4m3, one float32 scale for each 128 rows and columns (DeepSeek-AI 2024)",
)

FORMATS: Final = {
    one.name: one
    for one in (
        *(I8, I8_G32, Q8_0, I6_G32, I4_G32, B4_G32, B4_G64, B4_G128, Q4_0, Q4_1),
        *(E4M3, E4M3_B128),
    )
}
"""Every format by name."""

GGUF_FORMATS: Final = {one.name: one for one in (Q8_0, Q4_0, Q4_1)}
"""Those whose codes are the bytes of tensors in GGUF files, by the file's name in lower case."""


def get_format(name: object) -> Format:
    """The format of that name; ProgramError if there is none."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ProgramError(f"unknown format {name!r}", hint=f"known: {', '.join(FORMATS)}")
    return FORMATS[name]
