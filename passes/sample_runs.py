"""How programs are run to be compared: a prompt at once, or two sequences in paged steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from ..ir.builder import ProgramBuilder
from ..ir.interpret import Interpreter, WeightSource
from ..ir.ops.quantized import QUANTIZERS
from ..ir.paged_state import PagedState
from ..ir.program import Attr, Node, Operand, Program, WeightExpr, WeightRef
from ..ir.quantized_pairs import QuantizedPairs
from ..ir.types import TensorType
from ..ir.weights import evaluate_expr, evaluate_weight
from .match import adopt_name
from .samples import SampleWeights
from .widened_weights import widened

if TYPE_CHECKING:
    import torch

    Outputs = tuple[torch.Tensor, ...]

Cuts = tuple[tuple[int, ...], ...]
"""For each sequence, where its steps begin and end."""
SPLIT_ELEMENTS: Final = 1 << 24
"""Matrices of more elements are widened some rows at a time."""


def _tokens(program: Program, length: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(17)
    return torch.randint(0, program.spec.vocab_size or 2, (length,), generator=generator)


def wanted_rows(lengths: list[int], cuts: Cuts) -> list[int]:
    """The positions at which a step of either sequence ends, ascending."""
    ends = {
        min(last, length) - 1
        for places, length in zip(cuts, lengths, strict=True)
        for first, last in pairwise(places)
        if min(last, length) > first
    }
    return sorted(ends)


def _interpreter(
    program: Program, pairs: QuantizedPairs, state: PagedState | None = None, wide: str = "f32"
) -> Interpreter:
    """In float32, float64 over codes; weights one at a time, random without a checkpoint."""
    wide = run_dtype(program, wide)
    program = split_matrices(program)
    return Interpreter(program, weight_source(program, pairs), state, dtype_override=wide)


def run_dtype(program: Program, wide: str = "f32") -> str:
    """What floats of a run are held in: `wide`, but float64 over codes.

    Codes step: float32 sums in another order would make other codes now and then, and hide less.
    """
    return "f64" if any(node.op in QUANTIZERS for node in program.nodes) else wide


def weight_source(program: Program, pairs: QuantizedPairs) -> WeightSource:
    """Reads the weights of the checkpoint one at a time; random ones where there is none."""
    if "checkpoint" not in program.loaders:
        sample = SampleWeights((program,))
        return lambda name: sample.get(program, name)

    def real(name: str) -> torch.Tensor:
        entry = program.weights[name]
        expr = widened(entry.expr)
        if expr is not entry.expr:
            return evaluate_expr(expr, program.loaders, pairs)
        return evaluate_weight(program, entry, check_finite=False, pairs=pairs)

    return real


def split_matrices(program: Program) -> Program:
    """The program with its largest matrices in parts, so that none is widened as a whole."""
    large = {id(node) for node in program.nodes if _is_large(program, node)}
    if not large:
        return program
    builder = ProgramBuilder.from_program(program)
    for node in program.nodes:
        if id(node) not in large:
            builder.copy(node)
            continue
        mark = len(builder.nodes)
        x, ref, *bias = node.inputs
        assert isinstance(ref, WeightRef)
        depth = _depth(program, ref)
        outputs = program.weights[ref.name].type.num_elements() // depth
        step = max(1, SPLIT_ELEMENTS // depth)
        parts = [
            builder.emit(
                node.op,
                x,
                *(_rows(builder, one, i, min(i + step, outputs)) for one in (ref, *bias)),
            )
            for i in range(0, outputs, step)
        ]
        joined = builder.emit("concat", *parts, dim=-1)
        adopt_name(builder, mark, node.output, joined)
    return builder.build()


def _is_large(program: Program, node: Node) -> bool:
    if node.op != "linear" or not all(isinstance(ref, WeightRef) for ref in node.inputs[1:]):
        return False
    return program.weights[node.weights()[0].name].type.num_elements() > SPLIT_ELEMENTS


def _depth(program: Program, ref: WeightRef) -> int:
    depth = program.weights[ref.name].type.shape[-1]
    assert isinstance(depth, int)
    return depth


def _rows(builder: ProgramBuilder, ref: Operand, start: int, stop: int) -> WeightRef:
    """Some rows of a weight, as a weight."""
    assert isinstance(ref, WeightRef)
    weight = builder.weights[ref.name]
    kind = TensorType(weight.type.dtype, (stop - start, *weight.type.shape[1:]))
    return builder.weight(f"{ref.name}[{start}]", kind, _sliced(weight.expr, start, stop))


def _sliced(expr: WeightExpr, start: int, stop: int) -> WeightExpr:
    """Some rows of an expression: cut before their type is changed, so that no others are."""
    if expr.op == "cast":
        return replace(expr, inputs=(_sliced(expr.inputs[0], start, stop),))
    attrs: dict[str, Attr] = {"dim": 0, "start": start, "stop": stop}
    return WeightExpr("slice", (expr,), attrs)


def run_whole(
    program: Program,
    pairs: QuantizedPairs,
    length: int,
    rows: Sequence[int],
    wide: str = "f32",
) -> Outputs:
    """The outputs at these positions of a sequence that is run at once."""
    import torch

    inputs = {
        "input_ids": _tokens(program, length),
        "positions": torch.arange(length),
        "logits_index": torch.tensor(rows),
    }
    return tuple(_interpreter(program, pairs, wide=wide).run(inputs))


def run_paged(
    program: Program, pairs: QuantizedPairs, lengths: list[int], cuts: Cuts
) -> tuple[list[int], Outputs]:
    """Positions at the end of each step, both sequences in the same steps, and the outputs."""
    import torch

    state = _pages(program, lengths)
    interpreter = _interpreter(program, pairs, state)
    places: list[int] = []
    results: list[Outputs] = []
    tokens = _tokens(program, lengths[0])
    for step in range(len(cuts[0]) - 1):
        spans = [
            (i, min(cuts[i][step], length), min(cuts[i][step + 1], length))
            for i, length in enumerate(lengths)
        ]
        spans = [span for span in spans if span[2] > span[1]]
        if not spans:
            continue
        counts = [last - first for _, first, last in spans]
        starts = torch.tensor([0, *counts]).cumsum(0)
        positions = torch.cat([torch.arange(first, last) for _, first, last in spans])
        tables = {
            group.name: torch.stack([_table(group.block_size, i, lengths) for i, _, _ in spans])
            for group in program.resources
        }
        contexts = torch.tensor([last for _, _, last in spans])
        state.set_step(positions, starts, contexts, tables)
        ids = torch.cat([tokens[first:last] for _, first, last in spans])
        inputs = {"input_ids": ids, "positions": positions, "logits_index": starts[1:] - 1}
        results.append(tuple(interpreter.run(inputs)))
        places.extend(last - 1 for _, _, last in spans)
    return places, tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def _blocks_each(block_size: int, lengths: list[int]) -> int:
    return -(-max(lengths) // block_size)


def _pages(program: Program, lengths: list[int]) -> PagedState:
    """Storage for two sequences beside the null block, poisoned where nothing is written.

    Blocks that hold a whole context are no longer than the sequences: the rest is never reached.
    """
    longest = max(lengths)
    groups = [
        replace(group, block_size=min(group.block_size, longest)) for group in program.resources
    ]
    smallest = min(group.block_size for group in groups)
    state = PagedState.allocate(groups, 1 + 2 * _blocks_each(smallest, lengths), dtype="f64")
    for storage in (*state.keys.values(), *state.values.values()):
        storage.fill_(float("nan"))
    return state


def _table(block_size: int, sequence: int, lengths: list[int]) -> torch.Tensor:
    """Blocks of a sequence, in no order that a program could rely on."""
    import torch

    count = _blocks_each(block_size, lengths)
    return torch.arange(1 + sequence, 1 + 2 * count, 2).flip(0)
