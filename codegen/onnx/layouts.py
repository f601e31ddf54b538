"""How matrices of codes are stored for ONNX: by column, as its products take them, or by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from onnx import TensorProto

from ...ir.formats import CENTERED_I4, Format, get_format
from ...ir.ops.base import Attrs, int_attr
from ...ir.program import Attr, Weight, WeightExpr
from ...ir.types import Dim, DType, TensorType
from ...ir.weights import WeightOp, register_weight_op
from .types import STORED

if TYPE_CHECKING:
    import torch

Lead = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file of weights, and what it is in ONNX.

    Codes of 4 bits lie two in a byte, the first in the lower half, which the file has as bytes.
    With `count` above 1, the weight is a stack of so many, each of which is a tensor of its own in
    ONNX, and this is the one at `index`.
    """

    weight: Weight
    shape: tuple[int, ...]
    dtype: int
    count: int = 1
    index: int = 0

    @property
    def name(self) -> str:
        """What it is called in the graph."""
        return self.weight.name if self.count == 1 else f"{self.weight.name}.{self.index}"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """All tensors of the stack, in the order of their bytes."""
        return tuple(replace(self, index=index) for index in range(self.count))

    @classmethod
    def plain(cls, weight: Weight) -> Stored:
        """One that is the same on both sides."""
        sizes = tuple(dim for dim in weight.type.shape if isinstance(dim, int))
        return cls(weight, sizes, STORED[weight.type.dtype])


def can_store(form: Format) -> bool:
    """Whether ONNX has a type for the codes of a format, which then is a number times a scale."""
    is_number = not form.levels or form.levels == CENTERED_I4
    return is_number and not form.tile and form.minimum is None


@dataclass(frozen=True, slots=True)
class CodedMatrix:
    """A matrix `[N, K]` as codes and scales of the program, in a format.

    `expert` is its place where these are of a stack `[E, N, K]`.
    """

    codes: Weight
    scales: Weight
    form: Format
    depth: int
    expert: int | None = None

    @property
    def rows(self) -> int:
        """N."""
        size = self.codes.type.shape[-2]
        assert isinstance(size, int)
        return size

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return -(-self.depth // self.form.group)

    def columns(self) -> Stored:
        """The codes as `[K, N]`: bytes, or 4 bits."""
        shape = (self.depth, self.rows)
        if self.form.bits == 4:
            return self._stored("by_column", _COLUMNS, shape, TensorProto.INT4)
        return self._stored("by_column", _COLUMNS, shape)

    def column_scales(self) -> Stored:
        """The scales of grouped codes as `[groups, N]`, those of the rows in them."""
        shape = (self.groups, self.rows)
        return self._stored("by_column", _SCALES, shape)

    def row_scales(self) -> Stored:
        """The scales of the rows, `[N]`, of codes that have no others."""
        count, index = self._place
        return Stored(self.scales, (self.rows,), STORED[DType.F32], count, index)

    def lines(self) -> Stored:
        """The codes as bytes `[N, K]`."""
        shape = (self.rows, self.depth)
        return self._stored("by_row", _LINES, shape)

    def line_scales(self) -> Stored:
        """The scales of grouped codes as `[N, groups]`, those of the rows in them."""
        shape = (self.rows, self.groups)
        return self._stored("by_row", _LINE_SCALES, shape)

    def blocks(self) -> Stored:
        """The codes of grouped formats as `MatMulNBits` has them, `[N, groups, bytes of one]`."""
        shape = (self.rows, self.groups, self.form.group * self.form.bits // 8)
        return self._stored("in_blocks", _BLOCKS, shape)

    @property
    def _place(self) -> tuple[int, int]:
        """How many matrices there are, and which one it is."""
        count = self.codes.type.shape[0]
        assert isinstance(count, int)
        return (1, 0) if self.expert is None else (count, self.expert)

    def _stored(
        self, how: str, op: WeightOp, shape: tuple[int, ...], dtype: int | None = None
    ) -> Stored:
        source = self.scales if op in (_SCALES, _LINE_SCALES) else self.codes
        parts = (self.codes.expr, self.scales.expr) if source is self.scales else (source.expr,)
        attrs: dict[str, Attr] = {"format": self.form.name, "depth": self.depth}
        kinds = [self.codes.type, self.scales.type] if source is self.scales else [source.type]
        kind = op.rule(kinds, attrs)
        weight = Weight(f"{source.name}.{how}", kind, WeightExpr(op.name, parts, attrs))
        return Stored(weight, shape, STORED[kind.dtype] if dtype is None else dtype, *self._place)


def _numbers(codes: torch.Tensor, attrs: Attrs) -> torch.Tensor:
    """What the codes of matrices count in units of their scales: int8 `[.., N, K]`."""
    form = get_format(attrs["format"])
    numbers = form.code_levels(form.split(codes)["codes"])
    return numbers.flatten(-2)[..., : int_attr(attrs, "depth")]


def _columns(parts: Sequence[torch.Tensor], attrs: Attrs) -> torch.Tensor:
    import torch

    columns = _numbers(parts[0], attrs).mT.contiguous()
    if get_format(attrs["format"]).bits != 4:
        return columns
    flat = columns.flatten(-2)
    flat = torch.nn.functional.pad(flat, (0, flat.shape[-1] % 2))
    halves = (flat & 15).to(torch.uint8)
    return halves[..., 0::2] | (halves[..., 1::2] << 4)


def _line_scales(parts: Sequence[torch.Tensor], attrs: Attrs) -> torch.Tensor:
    codes, scales = parts
    groups = get_format(attrs["format"]).split(codes)["scale"].float()
    return groups.flatten(-2) * scales[..., None]


def _lines(parts: Sequence[torch.Tensor], attrs: Attrs) -> torch.Tensor:
    return _numbers(parts[0], attrs).contiguous()


def _blocks(parts: Sequence[torch.Tensor], attrs: Attrs) -> torch.Tensor:
    """Counted from the lowest number of so many bits; of 4 bits, the first in the lower half."""
    import torch

    form = get_format(attrs["format"])
    numbers = form.code_levels(form.split(parts[0])["codes"]).to(torch.int16)
    counted = (numbers + (1 << (form.bits - 1))).to(torch.uint8)
    return counted if form.bits == 8 else counted[..., 0::2] | (counted[..., 1::2] << 4)


def _scales(parts: Sequence[torch.Tensor], attrs: Attrs) -> torch.Tensor:
    return _line_scales(parts, attrs).mT.contiguous()


def _sizes(kinds: Sequence[TensorType], attrs: Attrs) -> tuple[Lead, int, int, int]:
    """The dimensions before a matrix, then N, K, and the groups of a row."""
    (*lead, rows, _), depth = kinds[0].shape, int_attr(attrs, "depth")
    assert isinstance(rows, int)
    return tuple(lead), rows, depth, -(-depth // get_format(attrs["format"]).group)


def _columns_type(kinds: Sequence[TensorType], attrs: Attrs) -> TensorType:
    lead, rows, depth, _ = _sizes(kinds, attrs)
    if get_format(attrs["format"]).bits == 4:
        return TensorType(DType.U8, (*lead, -(-depth * rows // 2)))
    return TensorType(DType.I8, (*lead, depth, rows))


def _blocks_type(kinds: Sequence[TensorType], attrs: Attrs) -> TensorType:
    lead, rows, _, groups = _sizes(kinds, attrs)
    form = get_format(attrs["format"])
    return TensorType(DType.U8, (*lead, rows, groups, form.group * form.bits // 8))


def _lines_type(kinds: Sequence[TensorType], attrs: Attrs) -> TensorType:
    lead, rows, depth, _ = _sizes(kinds, attrs)
    return TensorType(DType.I8, (*lead, rows, depth))


def _scales_type(kinds: Sequence[TensorType], attrs: Attrs) -> TensorType:
    lead, rows, _, groups = _sizes(kinds, attrs)
    return TensorType(DType.F32, (*lead, groups, rows))


def _line_scales_type(kinds: Sequence[TensorType], attrs: Attrs) -> TensorType:
    lead, rows, _, groups = _sizes(kinds, attrs)
    return TensorType(DType.F32, (*lead, rows, groups))


_ATTRS: Final = ("format", "depth")
_COLUMNS: Final = register_weight_op(WeightOp("onnx_columns", _columns, _columns_type, _ATTRS))
_BLOCKS: Final = register_weight_op(WeightOp("onnx_blocks", _blocks, _blocks_type, _ATTRS))
_SCALES: Final = register_weight_op(
    WeightOp("onnx_column_scales", _scales, _scales_type, _ATTRS, inputs=2)
)
_LINES: Final = register_weight_op(WeightOp("onnx_rows", _lines, _lines_type, _ATTRS))
_LINE_SCALES: Final = register_weight_op(
    WeightOp("onnx_row_scales", _line_scales, _line_scales_type, _ATTRS, inputs=2)
)
