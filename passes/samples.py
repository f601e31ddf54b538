"""Data that passes are verified on: the same names give the same numbers, on both sides."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..ir.formats import GGUF_FORMATS, Format, get_format
from ..ir.program import Program, Value, Weight, WeightLoader, WeightRef
from ..ir.quantized_pairs import QuantizedPairs
from ..ir.schemes import Quantizer, get_scheme
from ..ir.torch_types import to_torch
from ..ir.types import DType, Sym, TensorType, evaluate_dim
from ..ir.weights import LEAVES, evaluate_expr, leaves
from .widened_weights import widened, without_factors

if TYPE_CHECKING:
    import torch

TOKENS = 67
"""Rows of a sample: odd, more than one tile of any kernel, and past position 16."""
ROWS = 19
OTHER_SIZE = 17
BLOCK = 1_000_003
"""Numbers that are drawn for a large weight, which holds them again and again: drawing all of them
would take longer than what they are drawn for. A prime, so that no two rows are the same."""
MAX_KEPT_ELEMENTS = 40_000_000
"""How many elements of random weights are kept for the next use."""


def bindings_of(program: Program) -> dict[str, int]:
    """Sizes of the symbols for a sample."""
    sizes = {"T": TOKENS, "R": ROWS}
    return {name: sizes.get(name, OTHER_SIZE) for name in program.symbols}


def _generator(name: str) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def random_tensor(name: str, kind: TensorType, bindings: Mapping[str, int]) -> torch.Tensor:
    """Random floats of about unit size in float32, the same for the same name and shape."""
    import torch

    shape = [evaluate_dim(dim, bindings) for dim in kind.shape]
    return torch.randn(shape, generator=_generator(name))


def _repeated(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """`count` numbers: those given, as often as they fit."""
    if len(numbers) == count:
        return numbers
    result = numbers.new_empty(count)
    for part in result.split(len(numbers)):
        part.copy_(numbers[: len(part)])
    return result


@dataclass(slots=True)
class SampleWeights:
    """Weights of both programs: random checkpoint tensors by name, constants as they are.

    `quantizers` are those of the scheme in less time, as in `QuantizedPairs`. `has_factors` is
    whether the scales of channels are those that were chosen, or left out.
    """

    programs: tuple[Program, ...]
    quantizers: Mapping[str, Quantizer] = field(default_factory=dict)
    has_factors: bool = True
    leaf_types: dict[str, TensorType] = field(default_factory=dict)
    _stored: dict[str, str] = field(default_factory=dict)
    _kept: dict[str, torch.Tensor] = field(default_factory=dict)
    _pairs: QuantizedPairs = field(init=False)
    _read: WeightLoader = field(init=False)
    _read_packed: WeightLoader = field(init=False)

    def __post_init__(self) -> None:
        self._pairs = QuantizedPairs(quantizers=self.quantizers)
        self._read = self.leaf  # one object: pairs are told apart by who reads them
        self._read_packed = self.packed
        for program in self.programs:
            for weight in program.weights.values():
                self.learn_types(weight)
                if weight.expr.op == "checkpoint":
                    self.leaf_types[str(weight.expr.attrs["name"])] = weight.type

    def get(self, program: Program, name: str) -> torch.Tensor:
        """The tensor of one entry of a program's weight table."""
        weight = program.weights[name]
        self.learn_types(weight)
        loaders = {"data": self._read, **program.loaders, "checkpoint": self._read}
        loaders["packed"] = self._read_packed
        expr = weight.expr if self.has_factors else without_factors(weight.expr)
        return evaluate_expr(widened(expr), loaders, self._pairs)

    def learn_types(self, weight: Weight) -> None:
        """Remember the types and formats that the leaves of a weight's expression give."""
        for leaf in leaves(weight.expr):
            dtype, shape = leaf.attrs.get("dtype"), leaf.attrs.get("shape")
            if isinstance(dtype, str) and isinstance(shape, tuple):
                sizes = tuple(size for size in shape if isinstance(size, int))
                name, stored = str(leaf.attrs[LEAVES[leaf.op]]), str(leaf.attrs.get("stored"))
                kind = TensorType(DType(dtype), sizes)
                if stored in GGUF_FORMATS:
                    self._stored[name] = stored
                if leaf.op == "packed":
                    kind = _widened_type(kind, get_format(stored))
                self.leaf_types[name] = kind

    def leaf(self, name: str) -> torch.Tensor:
        """A random checkpoint tensor, kept for the other side of the region that reads it."""
        return self._keep(name, self._make)

    def packed(self, name: str) -> torch.Tensor:
        """The codes of that tensor in the format that a file would hold it in."""
        return self._keep(name, self._pack, "packed ")

    def _keep(
        self, name: str, make: Callable[[str], torch.Tensor], prefix: str = ""
    ) -> torch.Tensor:
        key = prefix + name
        if key not in self._kept:
            tensor = make(name)
            if sum(t.numel() for t in self._kept.values()) + tensor.numel() > MAX_KEPT_ELEMENTS:
                self._kept.clear()
            self._kept[key] = tensor
        return self._kept[key]

    def _make(self, name: str) -> torch.Tensor:
        """Random numbers, on the grid of the format where the tensor is stored in one."""
        import torch

        if name not in self._stored:
            return self._draw(name)
        codes, kind = self.packed(name), self.leaf_types[name]
        depth = kind.num_elements() // max(1, math.prod(codes.shape[:-1]))
        form = get_format(self._stored[name])
        return form.decode(codes, torch.ones(codes.shape[:-1]), depth).to(to_torch(kind.dtype))

    def _pack(self, name: str) -> torch.Tensor:
        scheme = get_scheme(self._stored[name])
        return self.quantizers.get(scheme.name, scheme.quantize)(self._draw(name))[0]

    def _draw(self, name: str) -> torch.Tensor:
        """Random rows of about unit length, or a vector around 1."""
        import torch

        kind = self.leaf_types.get(name)
        if kind is None:
            for program in self.programs:
                if "checkpoint" in program.loaders:
                    return program.loaders["checkpoint"](name)
            raise KeyError(f"the type of the checkpoint tensor {name} is not known")
        shape = [evaluate_dim(dim, {}) for dim in kind.shape]
        numbers = torch.randn(min(math.prod(shape), BLOCK), generator=_generator(name))
        if len(shape) == 1:
            numbers = 1 + 0.3 * numbers
        elif len(shape) >= 2:
            numbers = numbers / math.sqrt(max(shape[-1], 1))
        return _repeated(numbers.to(to_torch(kind.dtype)), math.prod(shape)).reshape(shape)


def with_random_weights(program: Program) -> Program:
    """The program with a checkpoint of random tensors, where it has none."""
    if "checkpoint" in program.loaders:
        return program
    sample = SampleWeights((program,))
    for weight in program.weights.values():
        sample.learn_types(weight)
    loaders = {**program.loaders, "checkpoint": sample.leaf, "packed": sample.packed}
    return replace(program, loaders=loaders)


def _widened_type(codes: TensorType, form: Format) -> TensorType:
    """The type of a matrix whose codes are of that type; its rows are whole blocks."""
    width = codes.shape[-1]
    assert isinstance(width, int)
    return TensorType(DType.F32, (*codes.shape[:-1], width // form.block_bytes * form.group))


def sample_inputs(
    program: Program, inputs: tuple[Value, ...], *, spread: bool = False
) -> dict[str, torch.Tensor]:
    """Tensors for these values: indices within what they index, floats at random.

    Positions count from 0; with `spread` they reach over the whole context.
    """
    bindings = bindings_of(program)
    result = {}
    for value in inputs:
        if value.type.dtype.is_float:
            result[value.name] = random_tensor(value.name, value.type, bindings)
        else:
            result[value.name] = _indices(program, value, bindings, spread)
    return result


def _indices(
    program: Program, value: Value, bindings: Mapping[str, int], spread: bool
) -> torch.Tensor:
    import torch

    shape = [evaluate_dim(dim, bindings) for dim in value.type.shape]
    count = math.prod(shape)
    limit = max(1, _index_limit(program, value, bindings))
    if value.name == "positions":
        numbers = torch.arange(count) % limit
        if spread:
            numbers = torch.linspace(0, limit - 1, count, dtype=torch.float64).long()
    elif value.name == "logits_index":
        numbers = torch.linspace(0, limit - 1, count, dtype=torch.float64).long()
    else:
        numbers = torch.randint(0, limit, (count,), generator=_generator(value.name))
    return numbers.reshape(shape).to(to_torch(value.type.dtype))


def _index_limit(program: Program, value: Value, bindings: Mapping[str, int]) -> int:
    """How large indices may be: the smallest table or dimension that they are looked up in."""
    names = {value.name}
    limits = []
    if value.name == "positions" and program.spec.max_context:
        limits.append(program.spec.max_context)
    for node in program.nodes:
        read = [v for v in node.values() if v.name in names]
        if not read:
            continue
        if node.op in ("reshape", "expand", "transpose", "slice", "cast"):
            names.update(v.name for v in node.outputs)
        elif node.op in ("embedding", "take", "gather", "scatter") and read[-1] == node.inputs[1]:
            limits.append(_indexed_size(program, node.inputs[0], node.attrs.get("dim"), bindings))
        elif node.op == "scaled_embedding":
            limits.append(_indexed_size(program, node.inputs[0], 0, bindings))
    fallback = program.spec.max_context or program.spec.vocab_size or OTHER_SIZE
    return min(limits, default=fallback)


def _indexed_size(
    program: Program, operand: object, dim: object, bindings: Mapping[str, int]
) -> int:
    if not isinstance(operand, (Value, WeightRef)):
        return OTHER_SIZE
    kind = program.operand_type(operand)
    assert isinstance(kind, TensorType)
    size = kind.shape[dim if isinstance(dim, int) else 0]
    return size.evaluate(bindings) if isinstance(size, Sym) else size
