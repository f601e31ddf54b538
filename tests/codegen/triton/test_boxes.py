"""Products whose operands the tensor memory accelerator copies: many rows, from sm_90 on."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infc.codegen.triton import configurations
from infc.codegen.triton.backend import Generated, generate
from infc.codegen.triton.boxes import Box, box_of
from infc.codegen.triton.lower import matrix
from infc.ir.builder import ProgramBuilder
from infc.ir.errors import DeviceError
from infc.ir.interpret import interpret
from infc.ir.program import Program
from infc.ir.targets import Target, resolve_target
from infc.ir.types import DType, Sym, TensorType
from infc.ir.weights import program_weights
from infc.runtime.executors.gpu.arrays import Layout
from infc.runtime.executors.gpu.driver import Function
from infc.runtime.executors.gpu.launching import Places, ReadyLaunch

from ...emulation.descriptors import decode
from ...emulation.driver import EmulatedDriver
from ...emulation.mutants import PtxMutant
from ..harness import Chunk, make_step, random_weights, with_weights
from .emulating import Emulating
from .interpreting import Interpreting
from .running import TARGET, Carrier, Runner

VOCAB, WIDTH, INNER = 40, 200, 264
TOKENS = 300
"""Three tiles of rows, the last one not full; columns and depth are no multiples either."""


def products(*, dtype: DType = DType.BF16, width: int = WIDTH) -> Program:
    """Two products of rows of a table, in bfloat16 and then in float32 with a bias."""
    b = ProgramBuilder("products", phase="planned")
    b.symbol("T", 1, 384)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    x = b.emit("embedding", b.weight("table", TensorType(dtype, (VOCAB, width))), ids)
    x = b.emit("linear", x, b.weight("w1", TensorType(dtype, (INNER, width))))
    w2, bias = TensorType(dtype, (VOCAB, INNER)), TensorType(dtype, (VOCAB,))
    x = b.emit("linear", x, b.weight("w2", w2), b.weight("bias", bias), dtype="f32")
    b.outputs = [x]
    program = b.build()
    program = replace(program, spec=replace(program.spec, vocab_size=VOCAB))
    return with_weights(program, random_weights(program, seed=5))


def functions(made: Generated, form: str) -> list[str]:
    """The kernels of products in a form."""
    (found,) = (one for one in made.forms if one.name == form)
    names = [made.codes[launch.kernel].function for launch in found.launches]
    return [name for name in names if name.startswith("linear")]


@pytest.fixture
def _two_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that each goes through several tiles."""

    def tile(target: Target, *, rows: int, bits: int) -> configurations.BoxTile | None:
        found = configurations.box_tile(target, rows=rows, bits=bits)
        return None if found is None else replace(found, programs=2)

    monkeypatch.setattr(matrix, "box_tile", tile)


def outcome(program: Program, process: Carrier, place: Path) -> tuple[np.ndarray, ...]:
    """What the ops mean, and what the kernels give for all tokens and for the first 70 alone."""
    ids = np.arange(TOKENS) * 7 % VOCAB
    (wanted,) = interpret(program, {"input_ids": torch.tensor(ids)}, program_weights(program))
    runner = Runner(program, program_weights(program), process)
    if isinstance(process, Emulating):
        process.compile(runner.made.codes, place)
    assert functions(runner.made, "mixed-384") == ["linear_boxes", "linear_boxes"]
    steps = [
        make_step([Chunk(part.tolist(), 0, list(range(20)))], num_groups=0, block_size=16)
        for part in (ids, ids[:70])
    ]
    return wanted.float().numpy(), *(runner.run(step).logits for step in steps)


@pytest.mark.usefixtures("_two_programs")
@pytest.mark.parametrize("compiled", [False, True], ids=["interpreted", "compiled"])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16], ids=lambda one: one.value)
def test_products_by_boxes_mean_what_the_ops_mean(
    dtype: DType, compiled: bool, interpreting: Interpreting, tmp_path: Path
) -> None:
    process: Carrier = Emulating() if compiled else interpreting
    wanted, found, first = outcome(products(dtype=dtype), process, tmp_path)
    assert np.abs(found - wanted).max() < 5e-3 * np.abs(wanted).max()
    assert np.array_equal(first, found[:70]), "a row depends on how many there are"


MUTANTS = {
    "fewer bytes are awaited": PtxMutant("linear_boxes", r"(expect_tx.*, )32768;", r"\g<1>16384;"),
    "boxes are not awaited": PtxMutant(
        "linear_boxes", r"mbarrier\.try_wait\S* complete, .*;", "setp.eq.u32 complete, 0, 0;"
    ),
    "products are not awaited": PtxMutant("linear_boxes", r"wgmma\.wait_group\S*\s+\d;", ""),
    "stores are not awaited": PtxMutant("linear_boxes", r"cp\.async\.bulk\.wait_group.*;", ""),
    "barriers are missing": PtxMutant("linear_boxes", r"bar\.sync[ \t]+0;", ""),
}


@pytest.mark.usefixtures("_two_programs")
@pytest.mark.parametrize("name", MUTANTS)
def test_what_does_not_wait_is_noticed(name: str, tmp_path: Path) -> None:
    changed = []

    def change(entry: str, source: str) -> str:
        found = MUTANTS[name].change(entry, source)
        changed.append(found != source)
        return found

    try:
        wanted, found, _ = outcome(products(), Emulating(change=change), tmp_path)
        noticed = not np.abs(found - wanted).max() < 5e-3 * np.abs(wanted).max()
    except DeviceError:
        noticed = True
    assert any(changed) and noticed


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89"])
def test_targets_that_copy_no_boxes_have_plain_tiles(target: str) -> None:
    made = generate(products(), resolve_target(target))
    assert functions(made, "mixed-384") == ["linear", "linear"]


def test_few_rows_and_rows_of_broken_words_have_plain_tiles() -> None:
    made = generate(products(), TARGET)
    assert functions(made, "mixed-64") == ["linear", "linear"]
    assert functions(made, "decode-384") == ["linear_boxes", "linear_boxes"]
    odd = generate(products(width=WIDTH + 4), TARGET)
    assert functions(odd, "mixed-384") == ["linear", "linear_boxes"]
    wide = generate(products(dtype=DType.F32), TARGET)
    assert functions(wide, "mixed-384") == ["linear", "linear"]


def test_wide_tiles_are_several_boxes() -> None:
    assert box_of("tensordesc<bf16[128, 64]>") == Box((128, 64), 128)
    assert box_of("tensordesc<fp32[128, 64]>") == Box((128, 32), 128)
    assert box_of("tensordesc<bf16[64, 32]>") == Box((64, 32), 64)
    with pytest.raises(ValueError, match="no descriptor"):
        box_of("*bf16")


def test_an_executor_passes_shapes_and_strides_as_the_kernel_declares_them() -> None:
    """Behind each descriptor: 32 bits for each size, 64 for each stride."""
    made = generate(products(), TARGET)
    form = next(one for one in made.forms if one.name == "mixed-384")
    launch = next(one for one in form.launches if "linear_boxes" in one.kernel)
    driver = EmulatedDriver()
    base = driver.allocate(1 << 24, "memory")
    places = Places(lambda pointer: base, 0, lambda name: None, lambda name: set())
    ready = ReadyLaunch(launch, Function("f", None, 32, 0), places, driver)
    call = ready.call({"T": 70}, Layout({}, 0))
    assert call is not None and ready.sizes == {"T"}
    found, at = call[2], 0
    for rows, columns, box in ((70, WIDTH, 128), (INNER, WIDTH, 128), (70, INNER, 128)):
        at += -at % 64
        described = decode(found[at : at + 128])
        assert (described.shape, described.box) == ((rows, columns), (box, 64))
        numbers = struct.unpack_from("<iiqq", found, at + 128)
        assert numbers == (rows, columns, columns, 1)
        at += 152 if (rows, columns) != (INNER, WIDTH) else 160  # the bias follows the matrix
    assert struct.unpack_from("<3i4xQQ", found, at) == (70, INNER, WIDTH, 0, 0)
    assert len(found) == at + 32
