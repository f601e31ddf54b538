"""Launches: a step of a device as data, which a backend emits and its executor carries out.

See `docs/design/launches.md`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

from .errors import ArtifactError
from .plain_data import decode, encode, unknown_keys
from .types import DType

VERSION: Final = 1
"""Of the text form; other versions are refused."""
MOST_THREADS: Final = 1024
"""Of a block, on every GPU."""
_MOST_OFFSET: Final = 1 << 48
_MOST_REAL: Final = 3.4028235677973366e38
"""What is above rounds to infinity in float32."""

LAUNCHES_FILE: Final = "code/launches.json"
"""Where in an artifact the launches of a program are."""

Space = Literal["arena", "weight", "state", "step", "output"]
"""Where an operand lies: scratch of one step; a tensor of the weights' file; the pages of a group;
an array of the step (`STEP_ARRAYS`); an array that the step returns."""

When = Literal["always", "copies", "head", "draws", "sampled", "adjusted", "logits", "hidden"]
"""Which steps need a launch: all; those that copy blocks; that need the head (`Step.needs_head`);
that draw tokens, some of them not the greatest, or adjust logits before; that return logits, or
hidden states."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A size that may depend on the step: `ceil((scale * size + offset) / divisor)`.

    `size` names one of `SIZES`; without a name it is 1.
    """

    scale: int
    size: str | None = None
    offset: int = 0
    divisor: int = 1

    def evaluate(self, sizes: Mapping[str, int]) -> int:
        """The number, where each size has the value given."""
        value = self.scale * (1 if self.size is None else sizes[self.size]) + self.offset
        return -(-value // self.divisor)


SIZES: Final[Mapping[str, str]] = {
    "T": "tokens",
    "R": "rows of logits",
    "B": "sequences",
    "D": "draws",
    "A": "draws with adjusted logits",
    "L": "rows of logits that are returned",
    "P": "carried tokens",
    "C": "block copies of the group that has most",
    "tiles": "tiles of queries (`tile_sequences`)",
}
"""What an extent may depend on. A program's further symbols come beside them."""

STEP_ARRAYS: Final[Mapping[str, str]] = {
    "token_ids": "i32[T]",
    "positions": "i32[T]",
    "query_starts": "i32[B+1]",
    "context_lengths": "i32[B]",
    "logits_index": "i32[R]",
    "logits_rows": "i32[L]",
    "carried": "i32[P, 2]: place in token_ids (-1 for padding), draw of the step before",
    "draws": "u8[D, 48]: records of `runtime/sampling/draws.py`",
    "tile_sequences": "i32[tiles]: the sequence of each tile of queries",
    "tile_rows": "i32[tiles]: its first row, counted from the sequence's first in this step",
    "block_table:GROUP": "i32[B, width]: row b lies at b * width; width is the plan's",
    "slots:GROUP": "i32[T]; -1 for padding, which stores nothing",
    "block_copies:GROUP": "i32[C, 2]: source, destination; a pair of equal blocks is padding",
    "adjusted": "u8[A, 36]: records of `runtime/sampling/adjustments.py`",
    "bias_ids": "i32[N]",
    "bias": "f32[N]",
    "count_ids": "i32[K]",
    "counts": "i32[K]",
    "masks": "u32[M, ceil(V / 32)]",
}
"""The arrays of a step on the device; GROUP stands for the name of a resource. Inputs that a
program takes beside those of every step go by `input:NAME`."""

OUTPUTS: Final[Mapping[str, str]] = {
    "tokens": "i32[D]",
    "logits": "f32[L, V]",
    "hidden": "f32[R, H]",
}
"""What a step returns; a program's further outputs go by their names. `tokens` of the step before
are `step:tokens_before`."""


@dataclass(frozen=True, slots=True)
class Pointer:
    """An address: `offset` bytes into what `space` has under `name` (none for the arena)."""

    space: Space
    name: str
    offset: int = 0

    kind: ClassVar[str] = "pointer"

    def plain(self) -> dict[str, Any]:
        """With the kind, which tells arguments apart."""
        return {"kind": self.kind, "space": self.space, "name": self.name, "offset": self.offset}


@dataclass(frozen=True, slots=True)
class Integer:
    """An integer of 32 bits."""

    value: Extent

    kind: ClassVar[str] = "i32"

    def plain(self) -> dict[str, Any]:
        """With the kind, which tells arguments apart."""
        return {"kind": self.kind, "value": self.value}


_NOT_FINITE: Final = ("inf", "-inf", "nan")


@dataclass(frozen=True, slots=True)
class Real:
    """A float32."""

    value: float

    kind: ClassVar[str] = "f32"

    def plain(self) -> dict[str, Any]:
        """With the kind, which tells arguments apart. JSON has no infinity: it is a text."""
        value = self.value if math.isfinite(self.value) else str(self.value)
        return {"kind": self.kind, "value": value}

    @staticmethod
    def from_plain(value: dict[str, Any]) -> dict[str, Any]:
        """The fields in what `plain` gave."""
        if value.get("value") in _NOT_FINITE:
            return {**value, "value": float(value["value"])}
        return value


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A descriptor of a dense row-major matrix for the tensor memory accelerator (sm_90 on).

    `shape` is outermost first; `box` is what one copy moves. `swizzle_bytes` is 0, 32, 64 or 128.
    """

    base: Pointer
    dtype: str
    shape: tuple[Extent, ...]
    box: tuple[int, ...]
    swizzle_bytes: int = 128

    kind: ClassVar[str] = "tensor_map"

    def plain(self) -> dict[str, Any]:
        """With the kind, which tells arguments apart; the base can only be a pointer."""
        base = {key: value for key, value in self.base.plain().items() if key != "kind"}
        return {
            "kind": self.kind,
            "base": base,
            "dtype": self.dtype,
            "shape": self.shape,
            "box": self.box,
            "swizzle_bytes": self.swizzle_bytes,
        }


Argument = Pointer | Integer | Real | TensorMap


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled kernel.

    `image` is the file with the machine code, `source` that with its PTX; `entry` is its symbol in
    both. `registers` and `spilled_bytes` are of one thread.
    """

    entry: str
    image: str
    source: str
    threads: int
    shared_bytes: int
    registers: int = 0
    spilled_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch. `arguments` are in the order of the kernel's parameters.

    `nodes` are the labels of the nodes that it computes. One that is `eager` is never part of a
    graph: it stands between two pieces of a step that can be captured. `dependent` launches begin
    before the one before them has ended, and wait for it themselves (programmatic dependent
    launch). The blocks of a `persistent` one share its work, however many there are: no more are
    launched than the GPU has processors.
    """

    kernel: str
    grid: tuple[Extent, ...]
    arguments: tuple[Argument, ...]
    nodes: tuple[str, ...] = ()
    when: When = "always"
    eager: bool = False
    dependent: bool = False
    persistent: bool = False


@dataclass(frozen=True, slots=True)
class Form:
    """The launches of steps of one kind, for at most `max_tokens` tokens.

    In a form for `one_query`, each sequence has one token.
    """

    name: str
    one_query: bool
    max_tokens: int
    launches: tuple[Launch, ...]
    query_tile: int = 1
    """How many query rows of one sequence a tile has."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """All that an executor carries out.

    The first form whose kind and bound fit a step is used. `buckets` are the numbers of sequences
    for which steps of one query each are captured whole, and `pieces` the numbers of tokens for
    which the pieces of other steps are; both ascend. `table_width` is the blocks of a sequence's
    row in each group's table.
    """

    target: str
    kernels: Mapping[str, Kernel]
    forms: tuple[Form, ...]
    arena_bytes: int
    table_width: Mapping[str, int]
    buckets: tuple[int, ...] = ()
    pieces: tuple[int, ...] = ()
    toolchain: Mapping[str, str] = field(default_factory=dict)

    def to_text(self) -> str:
        """JSON, a launch on a line."""
        data = {"version": VERSION, **encode(self)}
        forms = data.pop("forms")
        head = json.dumps(data, indent=1, sort_keys=True, allow_nan=False)[:-2]
        parts = []
        for form in forms:
            launches = ",\n  ".join(json.dumps(one, allow_nan=False) for one in form["launches"])
            rest = {key: value for key, value in form.items() if key != "launches"}
            parts.append(f'{json.dumps(rest)[:-1]}, "launches": [\n  {launches}]}}')
        listed = ",\n ".join(parts)
        return f'{head},\n "forms": [\n {listed}]\n}}\n'

    def form(self, num_tokens: int, *, one_query: bool) -> Form:
        """The form for a step; LookupError where none is for so many tokens."""
        for form in self.forms:
            if num_tokens <= form.max_tokens and (one_query or not form.one_query):
                return form
        raise LookupError(f"no form is for {num_tokens} tokens")


def read_launches(text: str, *, where: str) -> LaunchPlan:
    """The plan in a text; ArtifactError where it is not one."""
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise TypeError("not a mapping")
        version = data.pop("version", None)
        if version != VERSION:
            raise ArtifactError(
                f"the launches have version {version!r}, and this infc reads {VERSION}",
                where=where,
                hint="compile the model again with this infc",
            )
        if strange := sorted(unknown_keys(LaunchPlan, data)):
            raise TypeError(f"unknown key {strange[0]!r}")
        plan = decode(LaunchPlan, data, "launches")
        assert isinstance(plan, LaunchPlan)
        _check(plan)
    except (ValueError, TypeError, RecursionError) as error:
        message = f"the launches cannot be read: {error}"
        hint = "the artifact is damaged: compile it again"
        raise ArtifactError(message, where=where, hint=hint) from None
    return plan


def _check(plan: LaunchPlan) -> None:
    names = [form.name for form in plan.forms]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"forms: two are named {repeated[0]!r}")
    if plan.arena_bytes < 0:
        raise ValueError(f"arena_bytes: {plan.arena_bytes} is below 0")
    for name, kernel in plan.kernels.items():
        if not 1 <= kernel.threads <= MOST_THREADS or kernel.shared_bytes < 0:
            raise ValueError(
                f"kernels.{name}: {kernel.threads} threads, {kernel.shared_bytes} shared bytes"
            )
    for form in plan.forms:
        for place, launch in enumerate(form.launches):
            at = f"forms.{form.name}.launches[{place}]"
            if launch.kernel not in plan.kernels:
                raise ValueError(f"{at}.kernel: there is no {launch.kernel!r}")
            if not 1 <= len(launch.grid) <= 3:
                raise ValueError(f"{at}.grid: {len(launch.grid)} dimensions")
            for extent in launch.grid:
                if extent.divisor < 1:
                    raise ValueError(f"{at}.grid: a divisor below 1")
            for number, argument in enumerate(launch.arguments):
                if problem := _wrong_argument(argument, plan.arena_bytes):
                    raise ValueError(f"{at}.arguments[{number}]: {problem}")
    for name, sizes in (("buckets", plan.buckets), ("pieces", plan.pieces)):
        if list(sizes) != sorted(set(sizes)) or (sizes and sizes[0] < 1):
            raise ValueError(f"{name}: they do not ascend from 1")


def _wrong_argument(argument: Argument, arena_bytes: int) -> str:
    """What no kernel can be given; empty if it is right."""
    match argument:
        case Pointer(space="arena", offset=offset) if not 0 <= offset <= arena_bytes:
            return f"the offset {offset} is outside the arena of {arena_bytes} bytes"
        case Pointer(offset=offset) if not 0 <= offset < _MOST_OFFSET:
            return f"the offset {offset}"
        case Integer(value=extent) if extent.divisor < 1:
            return "a divisor below 1"
        case Real(value=value) if math.isfinite(value) and abs(value) > _MOST_REAL:
            return f"{value} is no float32"
        case TensorMap():
            return _wrong_argument(argument.base, arena_bytes) or _wrong_map(argument)
    return ""


def _wrong_map(matrix: TensorMap) -> str:
    if any(extent.divisor < 1 for extent in matrix.shape):
        return "a divisor below 1"
    if matrix.dtype not in {one.value for one in DType}:
        return f"there is no element type {matrix.dtype!r}"
    if len(matrix.box) != len(matrix.shape) or not all(1 <= one <= 256 for one in matrix.box):
        return f"a box {list(matrix.box)} of a matrix of rank {len(matrix.shape)}"
    if matrix.swizzle_bytes not in (0, 32, 64, 128):
        return f"a swizzle of {matrix.swizzle_bytes} bytes"
    return ""
