"""What runs of many windows keep in memory between two stretches, and what is said of it before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from infc.frontend.load import load_model
from infc.ir.interpret import Interpreter
from infc.ir.ops import Kind, get_op
from infc.ir.program import Program
from infc.ir.types import SymbolRange
from infc.ir.weights import program_weights
from infc.passes.methods.layer_runs import LayerRuns, bytes_per_token

from ...test_layout import ROOT

WINDOW = 48
WINDOWS = [tuple(range(start, start + WINDOW)) for start in range(3)]


def tiny() -> tuple[Program, Callable[[str], torch.Tensor]]:
    """A model of a few layers, and its weights."""
    program = load_model(ROOT / "recipes/tiny/checkpoint", dtype="float32", log=lambda _: None)
    program = replace(program, symbols=dict.fromkeys(program.symbols, SymbolRange(1, WINDOW)))
    return program, program_weights(program)


def held(runs: LayerRuns) -> int:
    """The bytes of all values that are there: views of one tensor count once."""
    storages = [x.untyped_storage() for values in runs.values for x in values.values()]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def test_the_bound_is_kept_and_near() -> None:
    program, weights = tiny()
    products = [
        index
        for index, node in enumerate(program.nodes)
        if get_op(node.op).kind is Kind.MATRIX and node.layer in (0, 1)
    ]
    most = 0
    with ThreadPoolExecutor(1) as pool:
        runs = LayerRuns(program, WINDOWS, weights, pool)
        before = held(runs)
        for index in products:
            runs.run_to(index)
            after = held(runs)
            most, before = max(most, before, after), after
    bound = bytes_per_token(program, WINDOW) * WINDOW * len(WINDOWS)
    assert torch.is_tensor(next(iter(runs.values[0].values())))
    assert most <= bound <= 3 * most


def test_one_matrix_at_a_time_is_there_and_is_read_once() -> None:
    """Over all layers in one go, with the bits that the interpreter gives."""
    program, source = tiny()
    index, take = next((i, node) for i, node in enumerate(program.nodes) if node.op == "take")
    products = [node for node in program.nodes[:index] if get_op(node.op).kind is Kind.MATRIX]
    matrices = [ref.name for node in products for ref in node.weights()]
    read: list[tuple[str, weakref.ref[torch.Tensor]]] = []
    most = 0

    def weights(name: str) -> torch.Tensor:
        nonlocal most
        tensor = source(name).clone()
        if name in matrices:
            read.append((name, weakref.ref(tensor)))
            most = max(most, sum(one() is not None for _, one in read))
        return tensor

    with ThreadPoolExecutor(2) as pool:
        runs = LayerRuns(program, WINDOWS, weights, pool)
        first = dict(runs.values[0])
        runs.run_to(index)
    assert most == 1
    assert [name for name, _ in read] == matrices
    rows = take.values()[0]
    (wanted,) = Interpreter(program, source).run(first, upto=rows.name)
    assert torch.equal(runs.get(rows)[0], wanted)
