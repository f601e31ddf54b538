"""What a program computes from positions alone, and where that is angles of rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from ..ir.ops import Kind, get_op
from ..ir.ops.base import is_token_dim
from ..ir.program import Node, Program, Value
from ..ir.types import Sym
from .constants import evaluate_nodes, reads_constants_only

if TYPE_CHECKING:
    import torch

_CHUNK: Final = 4096
"""How many positions are evaluated at once."""

Repeat = Literal["halves", "neighbours", "none"]
"""Which elements of a row are equal: (i, i + n/2), (2i, 2i + 1), or none."""


class PositionNodes:
    """The nodes that read nothing but positions and constants."""

    def __init__(self, program: Program, positions: Value) -> None:
        self.program = program
        self.positions = positions
        known = {positions.name}
        self.nodes: list[Node] = []
        for node in program.nodes:
            # Without operands: the ops that create values, which read no constant either.
            if reads_constants_only(program, node, lambda v: v.name in known):
                known.update(value.name for value in node.outputs)
                self.nodes.append(node)
        self.producers = {value.name: node for node in self.nodes for value in node.outputs}

    def tables(self) -> list[Value]:
        """The values to look up: read by other nodes, and not merely another view of a table."""
        inside = {id(node) for node in self.nodes}
        found: dict[str, Value] = {}
        for node in self.program.nodes:
            if id(node) in inside:
                continue
            for value in node.values():
                if value.name in self.producers:
                    base = self._behind_views(value)
                    if base is not None:
                        found[base.name] = base
        return list(found.values())

    def _behind_views(self, value: Value) -> Value | None:
        """Where the value's views and casts begin: the last float `[T, n]`; None for none."""
        while True:
            node = self.producers.get(value.name)
            if node is None:
                return None
            if not _is_rows(value):
                operands = node.values()
                if get_op(node.op).kind is not Kind.VIEW or len(operands) != 1:
                    return None
                value = operands[0]
                continue
            deeper = node.values()
            if node.op in ("reshape", "transpose", "expand", "cast") and _is_rows(deeper[0]):
                # A cast stays behind the table: a table holds what was computed, unrounded.
                value = deeper[0]
                continue
            return value

    def cone(self, value: Value) -> list[Node]:
        """The nodes that `value` is made by, in program order."""
        needed: set[int] = set()
        stack = [value]
        while stack:
            node = self.producers.get(stack.pop().name)
            if node is not None and id(node) not in needed:
                needed.add(id(node))
                stack.extend(node.values())
        return [node for node in self.nodes if id(node) in needed]

    def at(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        """All values for these positions."""
        import torch

        given = {self.positions.name: torch.tensor(positions)}
        return evaluate_nodes(self.program, self.nodes, given, len(positions))


def _is_rows(value: Value) -> bool:
    shape = value.type.shape
    return (
        len(shape) == 2
        and value.type.dtype.is_float
        and shape[0] == Sym("T")
        and not is_token_dim(shape[1], "T")
    )


def distinct(rows: torch.Tensor) -> tuple[Repeat, torch.Tensor]:
    """How the elements of rows [P, n] repeat, and the rows without the repeated ones."""
    import torch

    width = rows.shape[1]
    half = width // 2
    if width % 2 == 0 and torch.equal(rows[:, :half], rows[:, half:]):
        return "halves", rows[:, :half]
    if width % 2 == 0 and torch.equal(rows[:, 0::2], rows[:, 1::2]):
        return "neighbours", rows[:, 0::2]
    return "none", rows


@dataclass(frozen=True, slots=True)
class RotaryAngles:
    """Rows of `scale` times a sine or cosine of the position times each frequency."""

    function: str
    frequencies: torch.Tensor  # [n]
    scale: float
    repeat: Repeat

    def rows(self, positions: Sequence[int]) -> torch.Tensor:
        """The rows of these positions, [P, n] or [P, 2n]."""
        import torch

        attrs = {"function": self.function, "scale": self.scale}
        made = get_op("rotary").meaning(torch.tensor(positions), self.frequencies, **attrs)
        assert isinstance(made, torch.Tensor)
        if self.repeat == "halves":
            return torch.cat([made, made], 1)
        return made.repeat_interleave(2, 1) if self.repeat == "neighbours" else made


def find_angles(
    found: PositionNodes, values: Sequence[Value], length: int
) -> dict[str, RotaryAngles]:
    """The values that are angles of rotary embeddings at each position below `length`, by name.

    What the nodes look like gives candidates; that every bit of every row is the same decides.
    """
    import torch

    one = found.at([1])
    candidates = {value.name: _candidates(found, value, one) for value in values}
    for start in range(0, length, _CHUNK):
        if not any(candidates.values()):
            break
        chunk = range(start, min(start + _CHUNK, length))
        rows = found.at(chunk)
        candidates = {
            name: [one for one in several if torch.equal(one.rows(chunk), rows[name])]
            for name, several in candidates.items()
        }
    return {name: several[0] for name, several in candidates.items() if several}


def _candidates(
    found: PositionNodes, value: Value, one: Mapping[str, torch.Tensor]
) -> list[RotaryAngles]:
    """What a value may be: of its only sine, and of a literal that something is multiplied by.

    `one` are the values at position 1, where angles are their frequencies.
    """
    import torch

    cone = found.cone(value)
    turned = [node for node in cone if node.op in ("cos", "sin")]
    if len(turned) != 1 or value.type.dtype is not turned[0].output.type.dtype:
        return []
    repeat, wanted = distinct(one[value.name])
    frequencies = one[turned[0].values()[0].name].reshape(1, -1)
    if frequencies.shape[1] == 2 * wanted.shape[1]:
        _, frequencies = distinct(frequencies)
    if frequencies.shape[1] != wanted.shape[1] or frequencies.dtype is not torch.float32:
        return []
    literals = [
        float(operand)
        for node in cone
        if node.op == "mul"
        for operand in node.inputs
        if isinstance(operand, (int, float))
    ]
    return [
        RotaryAngles(turned[0].op, frequencies[0].contiguous(), scale, repeat)
        for scale in dict.fromkeys([1.0, *literals])
    ]
