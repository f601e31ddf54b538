"""Boxes: the parts of a matrix that the tensor memory accelerator copies, as Triton cuts them.

Knows nothing else of infc, so that the process which compiles can check it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

ELEMENT_BYTES: Final = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Of the types of matrices that are copied in boxes, as Triton calls them."""
_WIDEST_BYTES: Final = 128
"""Of a row of a box whose rows are swizzled."""


@dataclass(frozen=True, slots=True)
class Box:
    """What one copy moves, outermost first, and how its rows lie in shared memory."""

    shape: tuple[int, int]
    swizzle_bytes: int


def tile_type(kind: str, rows: int, columns: int) -> str:
    """Triton's type of a descriptor from which tiles are loaded, or to which they are stored."""
    return f"tensordesc<{kind}[{rows}, {columns}]>"


def is_tile(kind: str) -> bool:
    """Whether a parameter of that type is a descriptor."""
    return kind.startswith("tensordesc<")


def box_of(kind: str) -> Box:
    """The box in which a tile of such a type is moved: wide tiles are several boxes."""
    found = re.fullmatch(r"tensordesc<(\w+)\[(\d+), (\d+)\]>", kind)
    if found is None:
        raise ValueError(f"{kind!r} is no descriptor of tiles")
    size, rows, columns = ELEMENT_BYTES[found[1]], int(found[2]), int(found[3])
    row_bytes = min(columns * size, _WIDEST_BYTES)
    return Box((rows, row_bytes // size), row_bytes)
