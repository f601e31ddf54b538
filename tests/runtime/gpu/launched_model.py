"""An artifact of launches, written by hand, whose kernels are those of `kernels.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from infc.ir.artifact import Artifact, ArtifactWriter, open_artifact
from infc.ir.launches import (
    LAUNCHES_FILE,
    Argument,
    Extent,
    Form,
    Integer,
    Kernel,
    Launch,
    LaunchPlan,
    Pointer,
    When,
)
from infc.ir.manifest import (
    MAIN,
    CompiledProgram,
    Entry,
    Limits,
    Manifest,
    TargetMachine,
    WeightsFile,
)
from infc.ir.program import ModelSpec
from infc.ir.resources import KvGroup
from infc.ir.safetensors import write_safetensors
from infc.ir.types import DType, TensorType

from . import kernels as kernels  # registers them
from .late_driver import KERNELS

VOCAB: Final = 40
WIDTH: Final = 6
BLOCK: Final = 4
CONTEXT: Final = 64
TOKENS, SEQUENCES, ROWS = 16, 8, 8
GROUPS: Final = (
    KvGroup("full", (0,), 1, 1, 1, "f32", BLOCK),
    KvGroup("window", (1,), 1, 1, 1, "f32", BLOCK, 9),
)
TILE: Final = 3
_TABLE: Final = -(-CONTEXT // BLOCK)
_X, _FIRST, _OTHER, _STATES, _LOGITS = 0, 1024, 2048, 3072, 4096
_CHANGED: Final = _LOGITS + 4 * ROWS * VOCAB
ARENA_BYTES: Final = _CHANGED + 4 * SEQUENCES * VOCAB
WEIGHTS: Final = {"a": (300, 8), "b": (5,), "c": (1000, 33)}


def _arena(offset: int) -> Pointer:
    return Pointer("arena", "", offset)


def _step(name: str) -> Pointer:
    return Pointer("step", name)


def _number(value: int) -> Integer:
    return Integer(Extent(value))


def _launch(
    kernel: str, size: str, *arguments: Argument, when: When = "always", eager: bool = False
) -> Launch:
    return Launch(kernel, (Extent(1, size),), arguments, (), when, eager)


def _attention(group: KvGroup, out: int, *, one_query: bool) -> Launch:
    slots, table = _step(f"slots:{group.name}"), _step(f"block_table:{group.name}")
    start = (_arena(_X), Pointer("state", group.name), slots, table)
    numbers = (_number(BLOCK), _number(_TABLE))
    lengths = _step("context_lengths")
    if one_query:
        return _launch("attend_rows", "T", *start, lengths, _arena(out), *numbers)
    tiles = (_step("tile_sequences"), _step("tile_rows"))
    return _launch(
        *("attend_tiles", "tiles", *start, _step("query_starts"), lengths, *tiles, _arena(out)),
        *(*numbers, _number(TILE)),
        eager=True,
    )


def _form(name: str, most: int, *, one_query: bool) -> Form:
    draws, adjusted, index = _step("draws"), _step("adjusted"), _step("logits_index")
    token_ids, carried = _step("token_ids"), _step("carried")
    count = Integer(Extent(1, "P"))
    launches = [
        *(
            _launch(
                *("copy_blocks", "C", Pointer("state", group.name)),
                *(_step(f"block_copies:{group.name}"), _number(group.bytes_per_block())),
                when="copies",
            )
            for group in GROUPS
        ),
        _launch("resolve_carried", "P", token_ids, carried, _step("tokens_before"), count),
        _launch("embed", "T", token_ids, _arena(_X)),
        _attention(GROUPS[0], _FIRST, one_query=one_query),
        _attention(GROUPS[1], _OTHER, one_query=one_query),
        _launch("take", "R", _arena(_FIRST), _arena(_OTHER), index, _arena(_STATES)),
        _launch(
            *("hidden", "R", _arena(_STATES), Pointer("output", "hidden"), _number(WIDTH)),
            when="hidden",
        ),
        _launch("head", "R", _arena(_STATES), _arena(_LOGITS), _number(VOCAB), when="head"),
        _launch(
            *("adjust", "A", _arena(_LOGITS), draws, adjusted, _step("bias_ids"), _step("bias")),
            *(_step("count_ids"), _step("counts"), _step("masks"), token_ids, index, carried),
            *(count, _number(VOCAB), _arena(_CHANGED)),
            when="adjusted",
        ),
        _launch(
            *("draw_tokens", "D", _arena(_LOGITS), draws, adjusted, Integer(Extent(1, "A"))),
            *(_arena(_CHANGED), _number(VOCAB), Pointer("output", "tokens")),
            when="draws",
        ),
        _launch(
            *("pick_rows", "L", _arena(_LOGITS), _step("logits_rows")),
            *(Pointer("output", "logits"), _number(VOCAB)),
            when="logits",
        ),
    ]
    return Form(name, one_query, most, tuple(launches), 1 if one_query else TILE)


def make_plan(**changes: Any) -> LaunchPlan:
    """The launches: forms for few and for more tokens, buckets and pieces."""
    plan = LaunchPlan(
        target="sm_90",
        kernels={
            name: Kernel(name, f"code/kernels/{name}.cubin", f"code/kernels/{name}.ptx", 32, 0)
            for name in KERNELS
        },
        forms=(
            _form("decode-4", 4, one_query=True),
            _form("decode-8", 8, one_query=True),
            _form("mixed-6", 6, one_query=False),
            _form("mixed-16", 16, one_query=False),
        ),
        arena_bytes=ARENA_BYTES,
        table_width={group.name: _TABLE for group in GROUPS},
        buckets=(1, 2, 4, 8),
        pieces=(4, 8, 16),
    )
    return replace(plan, **changes)


def weight(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The values of a weight."""
    shape = WEIGHTS[name]
    return np.random.default_rng(len(name) + sum(shape)).standard_normal(shape, np.float32)


def write_launched_artifact(path: Path, plan: LaunchPlan, **changes: Any) -> Artifact:
    """Write and open the artifact; `changes` are of its program."""
    kinds = [(name, TensorType(DType.F32, shape)) for name, shape in WEIGHTS.items()]
    with ArtifactWriter(path) as writer:
        write_safetensors(writer.path / "weights.safetensors", kinds, weight)
        (writer.path / "code/kernels").mkdir(parents=True)
        (writer.path / LAUNCHES_FILE).write_text(plan.to_text())
        for name in KERNELS:
            (writer.path / f"code/kernels/{name}.cubin").write_text(f"code of {name}")
            (writer.path / f"code/kernels/{name}.ptx").write_text(f"text of {name}")
        main = CompiledProgram(
            entry=Entry("launches", LAUNCHES_FILE),
            inputs={"input_ids": "i32[T]", "positions": "i32[T]", "logits_index": "i32[R]"},
            outputs={"logits": f"f32[R, {VOCAB}]", "hidden": f"f32[R, {WIDTH}]"},
            limits=Limits(CONTEXT, TOKENS, SEQUENCES, ROWS),
            arena_bytes=ARENA_BYTES,
            weights=WeightsFile("weights.safetensors", tuple(WEIGHTS)),
            resources=GROUPS,
        )
        writer.commit(
            Manifest(
                infc_version="0.1.0",
                recipe={"kv_cache": {"memory": "64KiB"}},
                model=ModelSpec("toy", 2, 8, 1, 1, 8, VOCAB, CONTEXT, (None, 9), 1),
                backend="triton",
                target=TargetMachine("sm_90", ("sm_90",)),
                programs={MAIN: replace(main, **changes)},
                tokenizer=None,
            )
        )
    return open_artifact(path)
