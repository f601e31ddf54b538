"""What an op moves and computes: bytes, and operations by the kind of numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

OperationKind = Literal["fp32", "bf16", "int8"]
"""What is multiplied; processors do so at different rates."""

OPERATION_KINDS: Final[tuple[OperationKind, ...]] = ("fp32", "bf16", "int8")


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes read, bytes written, and arithmetic operations.

    Of the `flops`, `bf16` and `int8` are those that multiply such numbers; the rest is in float32.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0
    bf16: int = 0
    int8: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.flops + other.flops,
            self.bf16 + other.bf16,
            self.int8 + other.int8,
        )

    def times(self, count: int) -> Cost:
        """The cost of `count` such executions."""
        return Cost(
            self.bytes_read * count,
            self.bytes_written * count,
            self.flops * count,
            self.bf16 * count,
            self.int8 * count,
        )

    def of_kind(self, kind: OperationKind) -> Cost:
        """The same with all operations of one kind."""
        bf16, int8 = (self.flops if kind == one else 0 for one in ("bf16", "int8"))
        return replace(self, bf16=bf16, int8=int8)

    def operations(self, kind: OperationKind) -> int:
        """The operations of one kind."""
        match kind:
            case "fp32":
                return self.flops - self.bf16 - self.int8
            case "bf16":
                return self.bf16
            case "int8":
                return self.int8


@dataclass(frozen=True, slots=True)
class PagedLoad:
    """What the pages of one layer weigh in a step, for the cost of ops that touch them.

    The step's tokens are shared evenly among `sequences`; each has `context` positions stored,
    those of the step included. `token_bytes` is what one position's keys and values take.
    """

    sequences: int
    context: int
    token_bytes: int
