"""Tiles for this GPU: a few for each class of shapes, timed in steps of layers of the 8B shape.

What is faster than the shipped tables (`codegen/triton/tables`) goes into tables of the same form.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final
from unittest import mock

from infc.codegen.triton import configurations
from infc.codegen.triton.backend import Generated, generate
from infc.ir.artifact import Artifact, open_artifact
from infc.ir.errors import ToolchainError
from infc.ir.program import Program
from infc.ir.targets import Target

from .setting import Results, Setting
from .shapes import STEP_TOKENS, holes_for_weights, make_program, write_artifact
from .stepping import decode, prompt
from .steps import SMALL_STEP, open_executor

Row = Mapping[str, Any]

_TABLES: Final = ("linear", "coded", "attention")
_AT_ONCE: Final = 4
"""Artifacts that are compiled beside each other."""
_GAIN: Final = 0.98
"""A row is taken where a step takes at most so much of what it took."""


@dataclass(frozen=True, slots=True)
class TileClass:
    """The row of a table that one kind of steps uses, and what to try instead of it.

    Steps decode `decodes` (sequences, context), or compute prompts of `prompt` tokens.
    """

    name: str
    table: str
    sizes: Mapping[str, int]
    kind: Mapping[str, str]
    scheme: str
    tries: Sequence[Row]
    decodes: tuple[int, int] | None = None
    prompt: int = 0

    def row(self, target: Target) -> Row:
        """The row that is shipped."""
        return configurations._first(self.table, target, self.sizes, **self.kind)


def _tiles(warps: int, stages: int, *tiles: tuple[int, int, int]) -> list[Row]:
    return [{"tile": list(tile), "warps": warps, "stages": stages} for tile in tiles]


def _blocks(*blocks: tuple[int, int, int, int]) -> list[Row]:
    return [dict(zip(("rows", "keys", "warps", "stages"), one, strict=True)) for one in blocks]


_FEW: Final = _tiles(4, 4, (16, 32, 128), (16, 32, 256), (16, 128, 64), (16, 128, 128)) + _tiles(
    8, 4, (16, 64, 256), (16, 128, 128)
)
_MANY: Final = _tiles(8, 4, (128, 128, 64), (128, 256, 64)) + _tiles(
    8, 3, (128, 256, 64), (256, 128, 64)
)
_SOME: Final = _tiles(4, 4, (64, 32, 128), (64, 64, 64), (64, 128, 64))
_FEW_CODES: Final = _tiles(4, 3, (16, 32, 64), (16, 128, 64)) + _tiles(4, 5, (16, 64, 64))
_MANY_CODES: Final = _tiles(8, 3, (64, 128, 64), (128, 128, 64)) + _tiles(4, 3, (64, 64, 64))
_SPLITS: Final = _blocks((16, 64, 4, 3), (16, 128, 4, 2), (16, 128, 8, 2), (16, 32, 4, 3))
_PROMPTS: Final = _blocks((128, 64, 8, 2), (128, 64, 4, 2), (64, 128, 4, 2), (128, 128, 8, 2))

CLASSES: Final = (
    TileClass("linear-few", "linear", {"rows": 16, "bits": 16}, {}, "none", _FEW, (1, 512)),
    TileClass("coded-few", "coded", {"rows": 16}, {}, "int4", _FEW_CODES, (1, 512)),
    TileClass(
        "splits", "attention", {"head": 128, "bits": 16}, {"kind": "splits"}, "none", _SPLITS,
        (8, 8192),
    ),
    TileClass(
        "linear-many", "linear", {"rows": 8192, "bits": 16}, {}, "none", _MANY, prompt=2048
    ),
    TileClass(
        "tiles", "attention", {"head": 128, "bits": 16}, {"kind": "tiles"}, "none", _PROMPTS,
        prompt=8192,
    ),
    TileClass("coded-many", "coded", {"rows": 8192}, {}, "int4", _MANY_CODES, prompt=2048),
    TileClass("linear-some", "linear", {"rows": 64, "bits": 16}, {}, "none", _SOME, prompt=64),
)  # fmt: skip
SMALL_CLASSES: Final = (
    TileClass(
        "linear-few", "linear", {"rows": 16, "bits": 16}, {}, "none",
        _tiles(4, 2, (16, 32, 32), (16, 2048, 512)), (1, 40),
    ),
)  # fmt: skip
"""For an emulation. The second tile needs more shared memory than there is."""


def tune(setting: Setting) -> Results:
    """Milliseconds of the steps of each class, with what is shipped and with what was tried.

    Tables that begin with what was faster are in `tables`, to be copied to those that are shipped.
    """
    found: Results = {}
    better: dict[str, list[Row]] = {table: [] for table in _TABLES}
    small = setting.emulated is not None
    for one in SMALL_CLASSES if small else CLASSES:
        kept = setting.folder / f"tuned-{one.name}.json"
        if kept.exists():
            timed = json.loads(kept.read_text(encoding="utf-8"))
        elif setting.left > 10:
            timed = _time(setting, one)
            if not timed.pop("cut off"):
                kept.write_text(json.dumps(timed, indent=1) + "\n", encoding="utf-8")
        else:
            timed = {"skipped": f"{setting.left:.0f} s are left"}
        found[one.name] = timed
        if "row" in timed:
            better[one.table].append(timed["row"])
    folder = setting.folder / "tables"
    folder.mkdir(exist_ok=True)
    for table, rows in better.items():
        if rows:
            text = _table_text(table, rows)
            (folder / f"{table}.json").write_text(text, encoding="utf-8")
    return {"tuned": found}


def _table_text(table: str, rows: Sequence[Row]) -> str:
    """The shipped table with other rows before its own, in its form: a row on a line."""
    shipped = json.loads((configurations.TABLES / f"{table}.json").read_text(encoding="utf-8"))
    lines = ",\n  ".join(json.dumps(row) for row in [*rows, *shipped["rows"]])
    return f'{{\n "doc": {json.dumps(shipped["doc"])},\n "rows": [\n  {lines}\n ]\n}}\n'


def _time(setting: Setting, one: TileClass) -> Results:
    """The steps of a class with each of its rows, and the best row where one is better."""
    small = setting.emulated is not None
    target, folder = setting.target, setting.folder / "tuning"
    sizes = {"step_tokens": SMALL_STEP if small else STEP_TOKENS}
    shape = "tiny" if small else "8b-layers"
    program = make_program(shape, one.scheme, target, setting.folder / "shapes", **sizes)
    shipped = one.row(target)
    rows = [shipped, *({**shipped, **tried, "targets": [target.name]} for tried in one.tries)]
    times: dict[str, Any] = {}
    with holes_for_weights():
        made = []
        for row in rows:
            with _row_first(one.table, row):
                made.append(_of_one_form(generate(program, target), one))
        for first in range(0, len(rows), _AT_ONCE):
            if setting.left < 8:
                break
            part = range(first, min(len(rows), first + _AT_ONCE))

            def build(place: int) -> Artifact | str:
                where = folder / f"{one.name}-{place}"
                shutil.rmtree(where, ignore_errors=True)
                return _build(program, made[place], target, where)

            with ThreadPoolExecutor(_AT_ONCE) as pool:
                built = list(pool.map(build, part))
            for place, artifact in zip(part, built, strict=True):
                times[str(place)] = (
                    artifact if isinstance(artifact, str) else _milliseconds(setting, artifact, one)
                )
    shutil.rmtree(folder, ignore_errors=True)
    return _result(setting, rows, times)


def _result(setting: Setting, rows: Sequence[Row], times: Mapping[str, Any]) -> Results:
    measured = {int(place): ms for place, ms in times.items() if isinstance(ms, float)}
    tried = {json.dumps(_short(rows[int(place)])): ms for place, ms in times.items()}
    found: Results = {"ms": tried, "cut off": len(times) < len(rows)}
    best = min(measured, key=measured.__getitem__, default=0)
    if measured and best and measured[best] <= _GAIN * measured.get(0, 0.0):
        on = f"{setting.driver.device.name}: {measured[best]} ms, {measured[0]} ms before"
        found["row"] = {**rows[best], "measured": on}
        found["gain"] = round(measured[0] / measured[best], 3)
    return found


def _short(row: Row) -> Row:
    return {name: row[name] for name in ("tile", "rows", "keys", "warps", "stages") if name in row}


@contextmanager
def _row_first(table: str, row: Row) -> Iterator[None]:
    """A row before all others of a table."""
    read = configurations.read_table

    def rows(name: str) -> tuple[Row, ...]:
        return (row, *read(name)) if name == table else read(name)

    with mock.patch.object(configurations, "read_table", rows):
        yield


def _of_one_form(made: Generated, one: TileClass) -> Generated:
    """Only the form that the steps of a class have, and its kernels: others need no compiling."""
    tokens = one.decodes[0] if one.decodes else one.prompt
    form = next(
        form
        for form in made.forms
        if tokens <= form.max_tokens and form.one_query == (one.decodes is not None)
    )
    used = {launch.kernel for launch in form.launches}
    codes = {key: code for key, code in made.codes.items() if key in used}
    return replace(made, forms=(form,), codes=codes)


def _build(program: Program, made: Generated, target: Target, place: Any) -> Artifact | str:
    """The artifact, or why there is none."""
    try:
        write_artifact(program, made, target, place)
    except ToolchainError as error:
        return error.message[-200:]
    return open_artifact(place)


def _milliseconds(setting: Setting, artifact: Artifact, one: TileClass) -> float:
    groups = artifact.manifest.main.resources
    decodes = [one.decodes] if one.decodes else []
    executor = open_executor(setting, artifact, decodes, [one.prompt] if one.prompt else [])
    if one.decodes:
        timed = decode(executor, groups, *one.decodes, setting.num_steps)
    else:
        timed = prompt(executor, groups, one.prompt)
    executor.close()
    return timed["ms"]
