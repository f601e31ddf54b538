"""Runs a program on many windows of tokens at once, a stretch of nodes at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from ...ir.interpret import Interpreter
from ...ir.ops import Kind, get_op
from ...ir.program import Node, Program, Value, WeightRef
from ..plan_memory import is_view

if TYPE_CHECKING:
    import torch

    WeightSource = Callable[[str], torch.Tensor]

STEP_INPUTS: Final = frozenset({"input_ids", "positions", "logits_index"})
"""What a model's step may read; each window is one sequence, with every row of logits."""
WIDE: Final = "f32"
"""What all is computed in."""


def bytes_per_token(program: Program, tokens: int) -> int:
    """What the values between two stretches take at most for each token of a window, in float32.

    For windows of `tokens`, and stretches that end before each matrix product. While one runs, the
    values before and behind it are both there.
    """
    sizes = dict.fromkeys(program.symbols, tokens)
    last_use: dict[str, int] = {}
    of: dict[str, Value] = {value.name: value for value in program.inputs}
    ends = []
    for index, node in enumerate(program.nodes):
        if is_view(node.op) and node.values():
            of[node.output.name] = of[node.values()[0].name]
        else:
            of.update({value.name: value for value in node.outputs})
        last_use.update((of[value.name].name, index) for value in node.values())
        if _is_product(node):
            ends.append(index)
    made = {value.name: -1 for value in program.inputs}
    for index, node in enumerate(program.nodes):
        made.update((value.name, index) for value in node.outputs)
    most, before = 0, set[str]()
    for end in ends:
        there = {name for name, last in last_use.items() if made[name] < end <= last}
        taken = (of[name].type.num_elements(sizes) for name in before | there)
        most, before = max(most, 4 * sum(taken)), there
    return -(-most // tokens)


def _is_product(node: Node) -> bool:
    return get_op(node.op).kind in (Kind.MATRIX, Kind.EXPERTS)


@dataclass(slots=True)
class LayerRuns:
    """All windows go through the program side by side; `at` nodes are behind them.

    A stretch ends before each matrix product, so that one matrix at a time is there in float32.
    Between two stretches only the values that later nodes read are there, for every window; within
    one each window has its own, one window a thread, and the weights of the stretch are read once.
    """

    program: Program
    windows: Sequence[Sequence[int]]
    weights: WeightSource
    pool: Executor
    at: int = 0
    values: list[dict[str, torch.Tensor]] = field(default_factory=list)
    _last_use: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for index, node in enumerate(self.program.nodes):
            self._last_use.update((value.name, index) for value in node.values())
        self.values = [self._inputs(window) for window in self.windows]

    def run_to(self, end: int) -> None:
        """Runs the nodes before `end`."""
        for stop in range(self.at + 1, end):
            if _is_product(self.program.nodes[stop]):
                self._run_stretch(stop)
        if self.at < end:
            self._run_stretch(end)

    def _run_stretch(self, end: int) -> None:
        nodes = self.program.nodes[self.at : end]
        stretch = self._stretch(nodes, end)
        weights = self._weights_of(nodes)

        def run(index: int) -> dict[str, torch.Tensor]:
            given = self.values[index]
            length = len(self.windows[index])
            sizes = dict.fromkeys(self.program.symbols, 1) | {"T": length, "R": length}
            interpreter = Interpreter(stretch, weights.__getitem__, dtype_override=WIDE)
            inputs = {value.name: given[value.name] for value in stretch.inputs}
            results = interpreter.run(inputs, sizes=sizes)
            kept = {name: x for name, x in given.items() if self._last_use.get(name, -1) >= end}
            names = [value.name for value in stretch.outputs]
            return kept | dict(zip(names, results, strict=True))

        self.values = list(self.pool.map(run, range(len(self.windows))))
        self.at = end

    def has(self, value: Value) -> bool:
        """Whether a value is there now."""
        return value.name in self.values[0]

    def get(self, value: Value) -> list[torch.Tensor]:
        """A value in every window."""
        return [values[value.name] for values in self.values]

    def _inputs(self, window: Sequence[int]) -> dict[str, torch.Tensor]:
        import torch

        places = torch.arange(len(window))
        every = {
            "input_ids": torch.tensor(list(window)),
            "positions": places,
            "logits_index": places,
        }
        return {value.name: every[value.name] for value in self.program.inputs}

    def _stretch(self, nodes: Sequence[Node], end: int) -> Program:
        """These nodes as a program of their own, from what is there to what is read later."""
        made = {value.name for node in nodes for value in node.outputs}
        read = {v.name: v for node in nodes for v in node.values() if v.name not in made}
        kept = [
            value
            for node in nodes
            for value in node.outputs
            if self._last_use.get(value.name, -1) >= end
        ]
        return replace(
            self.program,
            inputs=tuple(read.values()),
            nodes=tuple(nodes),
            outputs=tuple(kept),
            output_names=(),
        )

    def _weights_of(self, nodes: Sequence[Node]) -> dict[str, torch.Tensor]:
        """The weights that nodes read, widened but for tables in which they look up rows."""
        found: dict[str, torch.Tensor] = {}
        for node in nodes:
            looks_up = get_op(node.op).kind is Kind.GATHER
            for ref in node.inputs:
                if isinstance(ref, WeightRef) and ref.name not in found:
                    tensor = self.weights(ref.name)
                    wide = tensor.is_floating_point() and not looks_up
                    found[ref.name] = tensor.float() if wide else tensor
        return found
