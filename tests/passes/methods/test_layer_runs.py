"""What runs of many windows keep in memory between two stretches, and what is said of it before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from infc.frontend.load import load_model
from infc.ir.ops import Kind, get_op
from infc.ir.types import SymbolRange
from infc.ir.weights import program_weights
from infc.passes.methods.layer_runs import LayerRuns, bytes_per_token

from ...test_layout import ROOT

WINDOW, WINDOWS = 48, 3


def held(runs: LayerRuns) -> int:
    """The bytes of all values that are there: views of one tensor count once."""
    storages = [x.untyped_storage() for values in runs.values for x in values.values()]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def test_the_bound_is_kept_and_near() -> None:
    program = load_model(ROOT / "recipes/tiny/checkpoint", dtype="float32", log=lambda _: None)
    program = replace(program, symbols=dict.fromkeys(program.symbols, SymbolRange(1, WINDOW)))
    products = [
        index
        for index, node in enumerate(program.nodes)
        if get_op(node.op).kind is Kind.MATRIX and node.layer in (0, 1)
    ]
    windows = [tuple(range(start, start + WINDOW)) for start in range(WINDOWS)]
    most = 0
    with ThreadPoolExecutor(1) as pool:
        runs = LayerRuns(program, windows, program_weights(program), pool)
        before = held(runs)
        for index in products:
            runs.run_to(index)
            after = held(runs)
            most, before = max(most, before, after), after
    bound = bytes_per_token(program, WINDOW) * WINDOW * WINDOWS
    assert torch.is_tensor(next(iter(runs.values[0].values())))
    assert most <= bound <= 3 * most
