"""The launches that programs become, in text that is reviewed by eye."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infc.codegen.registry import get_backend
from infc.codegen.triton.backend import Generated, generate
from infc.ir.errors import ArtifactError
from infc.ir.launches import (
    Argument,
    Extent,
    Integer,
    Launch,
    LaunchPlan,
    Pointer,
    Real,
    TensorMap,
    read_launches,
)
from infc.ir.program import Program
from infc.ir.targets import resolve_target
from infc.ir.text import parse_program
from infc.passes.pass_manager import run_passes
from infc.passes.pipeline import parse_pipeline

from .running import by_parameter

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(GOLDEN.glob("*.ir"))
SM_90 = resolve_target("sm_90")


def planned(path: Path) -> Program:
    """A lowered program as the backend wants it."""
    return plan(parse_program(path.read_text(encoding="utf-8"), source=str(path)))


def plan(program: Program) -> Program:
    """A lowered program as the backend wants it."""
    passes = parse_pipeline(get_backend("triton").plan_passes(SM_90))
    return run_passes(program, passes)[0]


def summary(made: Generated) -> Iterator[str]:
    """The launches of the first form of each kind; constants are those of the kernels."""
    yield f"arena of {made.arena_bytes} bytes, tables of {dict(made.table_width)} blocks"
    for form in (made.forms[0], made.forms[-1]):
        yield f"{form.name}: {form.max_tokens} tokens, tiles of {form.query_tile} queries"
        for launch in form.launches:
            how = launch.when + ", eager" * launch.eager + ", dependent" * launch.dependent
            yield f"  {how}: {_call(made, launch)}"


def _call(made: Generated, launch: Launch) -> str:
    code = made.codes[launch.kernel]
    pairs = by_parameter(code, launch)
    given = [f"{name}={_argument(argument)}" for (name, _), argument in pairs]
    constants = [f"{name}={value}" for name, value in code.constants]
    grid = " x ".join(map(_extent, launch.grid))
    tuning = f"{code.tuning.warps} warps, {code.tuning.stages} stages"
    nodes = f" for {', '.join(launch.nodes)}" if launch.nodes else ""
    text = f"{code.module}.{code.function}[{grid}]({', '.join(given)}; {', '.join(constants)})"
    return f"{text} {tuning}{nodes}"


def _argument(argument: Argument) -> str:
    match argument:
        case Pointer(space=space, name=name, offset=offset):
            return f"{space}{':' if name else ''}{name}+{offset}"
        case Integer(value=value):
            return _extent(value)
        case Real(value=value):
            return f"{value:g}"
        case TensorMap(base=base, shape=shape, box=box):
            sizes = "x".join(map(_extent, shape))
            return f"{_argument(base)} {argument.dtype}[{sizes}] by {box[0]}x{box[1]}"


def _extent(extent: Extent) -> str:
    if extent.size is None:
        return str(extent.evaluate({}))
    text = extent.size if extent.scale == 1 else f"{extent.scale}*{extent.size}"
    text = f"{text}+{extent.offset}" if extent.offset else text
    return text if extent.divisor == 1 else f"ceil({text}/{extent.divisor})"


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden(path: Path, update_golden: bool) -> None:
    text = "\n".join(summary(generate(planned(path), SM_90))) + "\n"
    golden = path.with_suffix(".launches")
    if update_golden:
        golden.write_text(text, encoding="utf-8")
    assert golden.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_equal_programs_have_equal_launches_that_can_be_read(path: Path) -> None:
    first, second = (generate(planned(path), SM_90) for _ in range(2))
    assert first == second
    plan = LaunchPlan("sm_90", {}, first.forms, first.arena_bytes, first.table_width)
    with pytest.raises(ArtifactError, match=r"forms\.decode-8\.launches\[0\]\.kernel"):
        read_launches(plan.to_text(), where="a")


def test_every_step_finds_a_form() -> None:
    made = generate(planned(CASES[0]), SM_90)
    plan = LaunchPlan("sm_90", {}, made.forms, made.arena_bytes, made.table_width)
    assert [form.name for form in made.forms] == ["decode-8", "mixed-64", "mixed-128"]
    assert plan.form(8, one_query=True).name == "decode-8"
    assert plan.form(9, one_query=True).name == plan.form(2, one_query=False).name == "mixed-64"
    assert plan.form(128, one_query=False).name == "mixed-128"
