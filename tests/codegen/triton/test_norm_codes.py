"""Norms and the codes of their rows in one launch: the bits of two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infc.codegen.triton import fusions
from infc.codegen.triton.aot import KernelBuild
from infc.codegen.triton.backend import generate
from infc.ir.builder import ProgramBuilder
from infc.ir.program import Attr, Program, Value
from infc.ir.schemes import SCHEMES
from infc.ir.targets import resolve_target
from infc.ir.types import DType, Sym, TensorType
from infc.ir.weights import program_weights

from ...gpu_breadth import RARELY
from ..harness import Chunk, make_step, with_weights
from .emulating import Emulating
from .interpreting import Interpreting
from .running import TARGET, Carrier, Runner
from .test_launches import plan

VOCAB, WIDTH = 24, 72
"""Two groups of 32 and a rest."""


def program_of(name: str, kind: str) -> Program:
    """A norm and a product by codes, then the same of their sum with the rows.

    Norms of the kind "early" round before their weights, and "post" norms what is added as well.
    """
    scheme = SCHEMES[name]
    rows = scheme.activations
    assert rows is not None
    random = torch.Generator().manual_seed(6)
    weights = {one: torch.randn(WIDTH, generator=random) for one in ("n1", "n2", "shift")}
    weights["table"] = torch.randn(VOCAB, WIDTH, generator=random)
    b = ProgramBuilder("codes", phase="planned")
    b.symbol("T", 1, 32)
    b.symbol("R", 1, 32)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    x = b.emit("embedding", b.weight("table", TensorType(DType.F32, (VOCAB, WIDTH))), ids)
    first, second = (b.weight(one, TensorType(DType.F32, (WIDTH,))) for one in ("n1", "n2"))

    def product(normed: Value, n: int) -> Value:
        codes, scale = scheme.quantize(torch.randn(n, WIDTH, generator=random))
        plain = TensorType(DType.F32, (n, WIDTH))
        kinds = scheme.weight.code_type(plain), scheme.weight.scale_type(plain)
        weights.update({f"w{n}": codes, f"s{n}": scale})
        w = [b.weight(f"{k}{n}", kind) for k, kind in zip("ws", kinds, strict=True)]
        options: dict[str, Attr] = {"codes": rows.codes.name, "group": rows.group}
        by = b.add("quantize_rows", (normed,), options).outputs
        return b.emit("scaled_linear", *by, *w, dtype="f32", scheme=name)

    if kind == "layer":
        shift = b.weight("shift", TensorType(DType.F32, (WIDTH,)))
        y = product(b.emit("layer_norm", x, first, shift, eps=1e-5), WIDTH)
        normed, total = b.add("add_layer_norm", (y, x, second, shift), {"eps": 1e-5}).outputs
    else:
        options: dict[str, Attr] = {"eps": 1e-5, "round_before_scale": kind == "early"}
        y = product(b.add("rms_norm", (x, first), options).output, WIDTH)
        if kind == "post":
            y = b.add("rms_norm", (y, first), {**options, "round_before_scale": True}).output
        normed, total = b.add("add_rms_norm", (y, x, second), options).outputs
    y = product(normed, VOCAB)
    b.outputs = [b.emit("add", y, b.emit("slice", total, dim=1, stop=VOCAB))]
    program = b.build()
    program = replace(program, spec=replace(program.spec, vocab_size=VOCAB))
    return with_weights(plan(program), weights)


def logits(program: Program, carrier: Carrier, place: Path | None = None) -> np.ndarray:
    # The interpreter knows no numbers of e4m3: it decodes them.
    target = TARGET if isinstance(carrier, Emulating) else resolve_target("sm_80")
    runner = Runner(program, program_weights(program), carrier, target=target)
    if place is not None:
        assert isinstance(carrier, Emulating)
        carrier.compile(runner.made.codes, place)
    few = make_step([Chunk([i], 0, [1]) for i in (3, 9, 4)], num_groups=0, block_size=16)
    many = make_step([Chunk(list(range(20)), 0, [1, 2])], num_groups=0, block_size=16)
    found = [runner.run(few, "decode-16").logits, runner.run(many, "mixed-32").logits]
    return np.concatenate(found)


NAMES = ("int8", "int8-token", "fp8", "fp8-block")
CASES = [(name, kind) for name in NAMES for kind in ("late", "early", "post", "layer")]
SOME = [("int8", "late"), ("fp8", "early"), ("int8-token", "post"), ("fp8-block", "layer")]
MARKED = [one if one in SOME else pytest.param(*one, marks=pytest.mark.breadth) for one in CASES]


@pytest.mark.parametrize(("name", "kind"), MARKED)
def test_norms_with_codes_have_the_bits_of_both(
    name: str, kind: str, interpreting: Interpreting, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of(name, kind)
    fused = generate(program, TARGET).forms
    found = logits(program, interpreting)
    monkeypatch.setattr(fusions, "_FUSIONS", {})
    single = generate(program, TARGET).forms
    saved = {len(b.launches) - len(a.launches) for a, b in zip(fused, single, strict=True)}
    assert saved == {3 if kind == "post" else 2}
    assert np.array_equal(found, logits(program, interpreting))


@pytest.mark.parametrize(
    ("name", "kind"), [("int8", "post"), ("fp8-block", "late"), ("int8-token", "layer")]
)
def test_compiled_norms_with_codes_have_the_bits_of_both(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of(name, kind)
    found = logits(program, Emulating(), tmp_path / "a")
    monkeypatch.setattr(fusions, "_FUSIONS", {})
    assert np.array_equal(found, logits(program, Emulating(), tmp_path / "b"))


@pytest.mark.breadth
@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=RARELY)])
def test_norms_with_codes_fit(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows of the length that they have in Gemma 2."""
    monkeypatch.setitem(globals(), "WIDTH", 2304)
    machine = resolve_target(target)
    programs = [program_of(name, kind) for name in NAMES for kind in ("post", "layer")]
    made = [generate(program, machine).codes for program in programs]
    codes = {key: code for one in made for key, code in one.items() if code.module == "normed"}
    build = KernelBuild(codes, machine, tmp_path / "kernels")
    build.start()
    assert build.wait().keys() == codes.keys() and codes
