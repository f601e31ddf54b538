"""The configuration of a kernel for a target and a class of shapes, from `tables/`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...ir.targets import Target
from .calls import Tuning

TABLES: Final = Path(__file__).parent / "tables"


@dataclass(frozen=True, slots=True)
class LinearTile:
    """How a product is cut: rows, columns and depth of a tile, and tiles that go together."""

    rows: int
    columns: int
    depth: int
    group: int
    tuning: Tuning


@dataclass(frozen=True, slots=True)
class BoxTile:
    """As `LinearTile`, of a product whose operands are copied in boxes, by so many programs."""

    rows: int
    columns: int
    depth: int
    group: int
    programs: int
    tuning: Tuning


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """How attention is cut: query rows times heads of a tile, and positions of a block."""

    rows: int
    keys: int
    tuning: Tuning


def linear_tile(target: Target, *, rows: int, bits: int) -> LinearTile:
    """The tile for a product of at most `rows` rows by a matrix of such elements."""
    found = _first("linear", target, {"rows": rows, "bits": bits})
    rows_of_tile, columns, depth = found["tile"]
    return LinearTile(rows_of_tile, columns, depth, found["group"], _tuning(found))


def box_tile(target: Target, *, rows: int, bits: int) -> BoxTile | None:
    """As `linear_tile`, where the target has what copies boxes, and such a product gains by it."""
    for row in read_table("boxes"):
        if target.name in row["targets"] and bits == row["bits"] and rows >= row["least_rows"]:
            rows_of_tile, columns, depth = row["tile"]
            group, programs = row["group"], row["programs"]
            return BoxTile(rows_of_tile, columns, depth, group, programs, _tuning(row))
    return None


def coded_tile(target: Target, *, rows: int) -> LinearTile:
    """The tile for a product of at most `rows` rows by a matrix of codes."""
    found = _first("coded", target, {"rows": rows})
    rows_of_tile, columns, depth = found["tile"]
    return LinearTile(rows_of_tile, columns, depth, found["group"], _tuning(found))


def attention_block(target: Target, *, kind: str, head: int, bits: int) -> AttentionBlock:
    """The block for `splits` or `tiles` over a cache of such elements and head size."""
    found = _first("attention", target, {"head": head, "bits": bits}, kind=kind)
    return AttentionBlock(found["rows"], found["keys"], _tuning(found))


def _tuning(row: Mapping[str, Any]) -> Tuning:
    return Tuning(row["warps"], row["stages"])


def _first(table: str, target: Target, sizes: Mapping[str, int], **equal: str) -> Mapping[str, Any]:
    for row in read_table(table):
        fits = all(row[name] is None or size <= row[name] for name, size in sizes.items())
        fits = fits and all(row[name] == value for name, value in equal.items())
        if fits and ("*" in row["targets"] or target.name in row["targets"]):
            return row
    raise LookupError(f"{table}.json has no row for {target} with {dict(sizes)} {equal}")


@functools.cache
def read_table(table: str) -> tuple[Mapping[str, Any], ...]:
    """The rows of a table, in order."""
    return tuple(json.loads((TABLES / f"{table}.json").read_text(encoding="utf-8"))["rows"])
