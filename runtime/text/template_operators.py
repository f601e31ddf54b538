"""Operators as chat templates use them: the size of what they make is paid for before."""

from __future__ import annotations

from typing import Any

from .template_format import percent
from .template_meter import PIECE, check_number, take
from .template_text import concat, repeat


def add(left: Any, right: Any) -> Any:
    """`left + right`."""
    if isinstance(left, str) and isinstance(right, str):
        return concat((left, right))
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        take((len(left) + len(right)) * PIECE // 8)
    check_number(left)
    check_number(right)
    return left + right


def multiply(left: Any, right: Any) -> Any:
    """`left * right`."""
    if isinstance(left, int) and isinstance(right, (str, list, tuple)):
        left, right = right, left
    check_number(right)
    if isinstance(left, str) and isinstance(right, int):
        return repeat(left, right)
    if isinstance(left, (list, tuple)) and isinstance(right, int):
        take(len(left) * max(0, right) * PIECE // 8)
    check_number(left)
    return left * right


def power(left: Any, right: Any) -> Any:
    """`left ** right`."""
    if isinstance(left, int) and isinstance(right, int):
        check_number(right)
        check_number(1 << min(1 << 16, max(0, right) * left.bit_length()))
    return left**right


def modulo(left: Any, right: Any) -> Any:
    """`left % right`."""
    return percent(left, right) if isinstance(left, str) else left % right
