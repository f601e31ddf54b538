"""Folding of equal layers, and names that only structure decides."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.driver.explain.listing import fold_layers, list_program, run_title
from infc.ir.program import Program
from infc.ir.text import parse_program, print_program

from .support import stack


@given(st.lists(st.sampled_from("ABC"), max_size=40))
def test_runs_expand_to_the_layers_they_came_from(layers: list[str]) -> None:
    expanded: dict[int, str] = {}
    for run in fold_layers(layers):
        for shown in run.shown:
            for member in run.members(shown):
                assert member not in expanded
                expanded[member] = layers[shown]
    assert [expanded[i] for i in range(len(layers))] == layers


@given(
    st.lists(st.sampled_from("ABC"), min_size=1, max_size=4), st.integers(2, 9), st.integers(1, 2)
)
def test_what_repeats_is_shown_once(pattern: list[str], repeats: int, others: int) -> None:
    layers = ["X", *pattern * repeats, *"YZ"[:others]]
    runs = fold_layers(layers)
    assert sum(run.period for run in runs) <= 1 + len(pattern) + others


@pytest.mark.parametrize(
    ("layers", "titles"),
    [
        ("", []),
        ("AB", ["layer 0", "layer 1"]),
        ("ABBBC", ["layer 0", "layers 1-3: 3 equal", "layer 4"]),
        ("SGSGSG", ["layers 0, 2, 4: 3 equal", "layers 1, 3, 5: 3 equal"]),
        ("SG" * 4, ["layers 0, 2 .. 6: 4 equal", "layers 1, 3 .. 7: 4 equal"]),
    ],
)
def test_titles(layers: str, titles: list[str]) -> None:
    runs = fold_layers(layers)
    assert [run_title(run, layer) for run in runs for layer in run.shown] == titles


def test_the_bundled_model_folds_to_three_layers(captured: Program) -> None:
    listing = list_program(captured)
    assert len(listing.layers) == 6
    assert sum(run.period for run in fold_layers(listing.layers)) <= 3
    assert len(listing.folded()) < 0.6 * len(print_program(captured).splitlines())


def test_names_of_values_do_not_count(captured: Program) -> None:
    text = print_program(captured)
    renamed = re.sub(r"%(\d+)\b", r"%v\1_", text)
    other = parse_program(renamed)
    assert {v.name for n in other.nodes for v in n.outputs} != {
        v.name for n in captured.nodes for v in n.outputs
    }
    assert list_program(other) == list_program(captured)


@given(st.integers(0, 4), st.sampled_from(["weight", "node"]))
def test_one_other_layer_stands_alone(layer: int, what: str) -> None:
    program = stack(5)
    if what == "node":
        place = next(
            i for i, n in enumerate(program.nodes) if n.layer == layer and 0.01 in n.inputs
        )
        old = program.nodes[place]
        new = replace(old, inputs=(old.inputs[0], 0.02))
        program = program.with_nodes((*program.nodes[:place], new, *program.nodes[place + 1 :]))
    else:
        name = f"layers.{layer}.gate"
        weight = program.weights[name]
        expr = replace(weight.expr, attrs={**weight.expr.attrs, "name": "elsewhere"})
        program = replace(program, weights={**program.weights, name: replace(weight, expr=expr)})
    plain, changed = list_program(stack(5)), list_program(program)
    assert [i for i in range(5) if plain.layers[i] != changed.layers[i]] == [layer]
