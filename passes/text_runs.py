"""Runs a program that is not lowered on windows of text: values on the way, logits at any row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from ..ir.analyses import LOGITS_INDEX, node_cost
from ..ir.interpret import Interpreter, NodeHook
from ..ir.program import LOGITS, Node, Program, Value
from ..ir.quantized_pairs import QuantizedPairs
from .sample_runs import split_matrices, weight_source

if TYPE_CHECKING:
    import torch

LOGITS_BYTES: Final = 1 << 26
"""What the logits of one run of the head may take in float32."""

_WIDE: Final = "f32"
"""What all is computed in. Over codes too: text is run to measure them, and a code that falls the
other way now and then is within what is measured."""

BEFORE_LAYERS: Final = -1
"""Where a layer has its number: what comes before the first."""

OnShare = Callable[[float], None]
"""Told which share (0 .. 1) of a window is done."""


@dataclass(slots=True)
class Window:
    """What ran of a window of text: `values` by name (those that were watched)."""

    runner: TextRunner
    num_tokens: int
    values: Mapping[str, torch.Tensor]
    _passed: Mapping[str, torch.Tensor]

    def logits(self, rows: Sequence[int]) -> Iterator[torch.Tensor]:
        """The logits `[n, V]` at these positions, in their order, some rows at a time."""
        step = self.runner.head_rows
        for start in range(0, len(rows), step):
            yield self.runner.run_head(self._passed, rows[start : start + step])


@dataclass(slots=True)
class TextRunner:
    """Runs a model's step in phases before lowering, in float32.

    Each window is a sequence of its own, run at once up to where rows of logits are chosen; from
    there on in parts, so that memory is bounded. Weights are read one at a time, in each window.
    `watched` names values that a window keeps.
    """

    program: Program
    pairs: QuantizedPairs = field(default_factory=QuantizedPairs)
    watched: frozenset[str] = frozenset()
    _body: Interpreter = field(init=False)
    _head: Interpreter = field(init=False)

    def __post_init__(self) -> None:
        program = split_matrices(self.program)
        weights = weight_source(program, self.pairs)
        body, head = split_at_rows(program, self.watched)
        self._body = Interpreter(body, weights, dtype_override=_WIDE)
        self._head = Interpreter(head, weights, dtype_override=_WIDE)

    @property
    def head_rows(self) -> int:
        """Rows of logits that are made at once."""
        return max(1, LOGITS_BYTES // (4 * max(1, self.program.spec.vocab_size)))

    def run(self, tokens: Sequence[int], on_share: OnShare | None = None) -> Window:
        """Run a window of text up to where rows are chosen."""
        import torch

        inputs = {"input_ids": torch.tensor(tokens), "positions": torch.arange(len(tokens))}
        if on_share is not None:
            self._body.hook = _share_hook(self._body.program, len(tokens), on_share)
        names = {value.name for value in self._body.program.inputs}
        given = {name: tensor for name, tensor in inputs.items() if name in names}
        results = self._body.run(given, sizes={"T": len(tokens), "R": 1})
        values = dict(zip((v.name for v in self._body.program.outputs), results, strict=True))
        watched = {name: values[name] for name in self.watched}
        return Window(self, len(tokens), watched, {**inputs, **values})

    def run_head(self, passed: Mapping[str, torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
        """The logits at these positions, of what the body of the program gave."""
        import torch

        given = {value.name: passed[value.name] for value in self._head.program.inputs[1:]}
        given[LOGITS_INDEX] = torch.tensor(rows)
        sizes = {"T": len(passed["input_ids"]), "R": len(rows)}
        logits = self._head.run(given, sizes=sizes)[0]
        return logits.reshape(len(rows), -1)


def split_at_rows(program: Program, watched: frozenset[str]) -> tuple[Program, Program]:
    """What does not depend on `logits_index`, and what does.

    The first gives what the second reads, and the watched values; the second's first input is
    `logits_index`, and its first output the logits.
    """
    early = values_before_rows(program)
    body = [node for node in program.nodes if all(v.name in early for v in node.outputs)]
    head = [node for node in program.nodes if not all(v.name in early for v in node.outputs)]
    logits = program.output(LOGITS)
    assert logits is not None, "the rows that are wanted are rows of logits"
    read = {value.name: value for node in head for value in node.values()}
    read |= {logits.name: logits} if logits.name in early else {}
    made = {value.name: value for node in body for value in node.outputs}
    crossing = [value for name, value in made.items() if name in read or name in watched]
    plain = [value for value in program.inputs if value.name != LOGITS_INDEX]
    index = next(value for value in program.inputs if value.name == LOGITS_INDEX)
    passed = [value for value in (*plain, *crossing) if value.name in read]
    program = replace(program, output_names=())
    first = replace(program, nodes=tuple(body), inputs=tuple(plain), outputs=tuple(crossing))
    second = replace(program, nodes=tuple(head), inputs=(index, *passed), outputs=(logits,))
    return first, second


def values_before_rows(program: Program) -> set[str]:
    """The names of values that do not depend on which rows of logits are wanted."""
    late = {LOGITS_INDEX}
    for node in program.nodes:
        if any(value.name in late for value in node.values()):
            late |= {value.name for value in node.outputs}
    made = {value.name for node in program.nodes for value in node.outputs}
    return made - late


def layer_outputs(program: Program) -> dict[int, Value]:
    """By layer the value that it hands on: the last one that something outside of it reads.

    Under `BEFORE_LAYERS`, that which the embeddings hand on to the first layer.
    """
    home = {value.name: node.layer for node in program.nodes for value in node.outputs}
    leaving = {
        value.name
        for node in program.nodes
        for value in node.values()
        if home.get(value.name) is not None and home[value.name] != node.layer
    }
    found: dict[int, Value] = {}
    for node in program.nodes:
        for value in node.outputs:
            if node.layer is not None and value.name in leaving and value.type.dtype.is_float:
                found[node.layer] = value
    if found and (embedded := embedded_value(program)) is not None:
        found[BEFORE_LAYERS] = embedded
    return dict(sorted(found.items()))


def embedded_value(program: Program) -> Value | None:
    """The first value of looked-up tokens that a layer reads, if nothing of a layer is in it."""
    made: set[str] = set()
    for node in program.nodes:
        if node.layer is None:
            is_looked_up = node.op in ("embedding", "scaled_embedding")
            if is_looked_up or any(value.name in made for value in node.values()):
                made |= {value.name for value in node.outputs}
            continue
        for value in node.values():
            if value.name in made and value.type.dtype.is_float:
                return value
    return None


def window_flops(program: Program, num_tokens: int, rows: int) -> int:
    """Operations of a window of so many tokens with logits at `rows` of them."""
    bindings = {"T": num_tokens, "R": rows, "B": 1}
    return sum(node_cost(program, node, bindings).flops for node in program.nodes)


def _share_hook(program: Program, num_tokens: int, on_share: OnShare) -> NodeHook:
    bindings = {"T": num_tokens, "R": 1, "B": 1}
    costs = [node_cost(program, node, bindings).flops for node in program.nodes]
    total, done, place = max(1, sum(costs)), 0, 0

    def hook(node: Node, results: tuple[torch.Tensor, ...]) -> None:
        nonlocal done, place
        done += costs[place]
        place += 1
        if costs[place - 1]:
            on_share(done / total)

    return hook
