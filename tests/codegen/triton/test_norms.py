"""Norms of Gemma 2 and GPT-2 with what stands around them: fewer launches that mean the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infc.codegen.triton import fusions
from infc.codegen.triton.backend import generate
from infc.ir.builder import ProgramBuilder
from infc.ir.interpret import interpret
from infc.ir.program import Attr, Program, WeightRef
from infc.ir.types import DType, Sym, TensorType
from infc.ir.weights import program_weights

from ..harness import Chunk, make_step, random_weights, with_weights
from .emulating import Emulating
from .interpreting import Interpreting
from .running import TARGET, Carrier, Runner
from .test_launches import plan

VOCAB, WIDTH, INNER = 24, 88, 72
FEW, MANY = (3, 9, 4), tuple(i * 5 % VOCAB for i in range(40))


class Build:
    """A program that begins with rows of a table."""

    def __init__(self) -> None:
        self.b = ProgramBuilder("norms", phase="planned")
        self.b.symbol("T", 1, 64)
        self.ids = self.b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
        table = self.weight("table", VOCAB, WIDTH)
        self.x = self.b.emit("embedding", table, self.ids)

    def weight(self, name: str, *shape: int) -> WeightRef:
        return self.b.weight(name, TensorType(DType.F32, shape))

    def program(self) -> Program:
        program = self.b.build()
        program = replace(program, spec=replace(program.spec, vocab_size=VOCAB))
        weights = random_weights(program, seed=5)
        return with_weights(plan(program), {name: one * 0.5 for name, one in weights.items()})


def post_normed(*, early: bool, last: bool) -> Program:
    """Two products whose normed results are added to the rows; both norms round as they say."""
    made = Build()
    b, x, total = made.b, made.x, made.x
    for place in range(2):
        y = b.emit("linear", x, made.weight(f"w{place}", WIDTH, WIDTH))
        first: dict[str, Attr] = {"eps": 1e-2, "round_before_scale": early}
        second: dict[str, Attr] = {"eps": 1e-5, "round_before_scale": last}
        y = b.add("rms_norm", (y, made.weight(f"post{place}", WIDTH)), first).output
        operands = (y, total, made.weight(f"norm{place}", WIDTH))
        x, total = b.add("add_rms_norm", operands, second).outputs
    y = b.emit("linear", x, made.weight("head", VOCAB, WIDTH))
    b.outputs = [b.emit("add", y, b.emit("slice", total, dim=1, stop=VOCAB))]
    return made.program()


def layer_normed(*, shift: bool) -> Program:
    """Norms with means, of rows and of the sum behind a product, with GPT-2's activation."""
    made = Build()
    b = made.b

    def norm(name: str) -> tuple[WeightRef, ...]:
        weight = made.weight(name, WIDTH)
        return (weight, made.weight(f"{name}.bias", WIDTH)) if shift else (weight,)

    x = b.emit("layer_norm", made.x, *norm("n1"), eps=1e-5)
    y = b.emit("relu", b.emit("linear", x, made.weight("w0", INNER, WIDTH)))
    y = b.emit("linear", y, made.weight("w1", WIDTH, INNER), made.weight("b1", WIDTH))
    normed, total = b.add("add_layer_norm", (y, made.x, *norm("n2")), {"eps": 1e-5}).outputs
    y = b.emit("linear", normed, made.weight("w2", INNER, WIDTH), made.weight("b2", INNER))
    y = b.emit("gelu", y, approximate="tanh")
    y = b.emit("linear", y, made.weight("w3", WIDTH, INNER), made.weight("b3", WIDTH))
    normed, _ = b.add("add_layer_norm", (y, total, *norm("n3")), {"eps": 1e-5}).outputs
    b.outputs = [b.emit("linear", normed, made.weight("head", VOCAB, WIDTH))]
    return made.program()


def logits(program: Program, carrier: Carrier, place: Path | None = None) -> list[np.ndarray]:
    """Of few tokens that are decoded, and of a prompt."""
    runner = Runner(program, program_weights(program), carrier)
    if place is not None:
        assert isinstance(carrier, Emulating)
        carrier.compile(runner.made.codes, place)
    few = make_step([Chunk([i], 0, [1]) for i in FEW], num_groups=0, block_size=16)
    many = make_step([Chunk(list(MANY), 0, [1, 2, 3])], num_groups=0, block_size=16)
    return [runner.run(few, "decode-16").logits, runner.run(many, "mixed-64").logits]


def names(program: Program, form: str) -> list[str]:
    """The kernels of nodes."""
    made = generate(program, TARGET)
    (found,) = (one for one in made.forms if one.name == form)
    return [made.codes[one.kernel].function for one in found.launches if one.nodes]


def meant(program: Program, ids: tuple[int, ...]) -> np.ndarray:
    (wanted,) = interpret(program, {"input_ids": torch.tensor(ids)}, program_weights(program))
    return np.asarray(wanted.float().numpy())


@pytest.mark.parametrize("early", [True, False])
def test_a_norm_and_that_of_the_sum_have_the_bits_of_both(
    early: bool, interpreting: Interpreting, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = post_normed(early=early, last=not early)
    for form in ("decode-16", "mixed-64"):
        assert names(program, form)[:5] == ["pick_rows", *["linear", "rms_norm"] * 2]
    found = logits(program, interpreting)
    monkeypatch.setattr(fusions, "_FUSIONS", {})
    assert names(program, "mixed-64")[:4] == ["pick_rows", "linear", "rms_norm", "rms_norm"]
    for one, other in zip(found, logits(program, interpreting), strict=True):
        assert one.any() and np.array_equal(one, other)


def test_compiled_norms_around_a_sum_mean_what_the_ops_mean(tmp_path: Path) -> None:
    program = post_normed(early=True, last=False)
    for found, ids in zip(logits(program, Emulating(), tmp_path), (FEW, MANY), strict=True):
        wanted = meant(program, ids)
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("compiled", [False, True], ids=["interpreted", "compiled"])
def test_products_norm_rows_with_means(
    compiled: bool, shift: bool, interpreting: Interpreting, tmp_path: Path
) -> None:
    program = layer_normed(shift=shift)
    few = ["pick_rows", *["normed_linear", "linear"] * 2, "normed_linear"]
    assert names(program, "decode-16") == few
    many = ["pick_rows", *["layer_norm", "linear", "linear"] * 2, "layer_norm", "linear"]
    assert names(program, "mixed-64") == many
    carrier: Carrier = Emulating() if compiled else interpreting
    place = tmp_path if compiled else None
    for found, ids in zip(logits(program, carrier, place), (FEW, MANY), strict=True):
        wanted = meant(program, ids)
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
