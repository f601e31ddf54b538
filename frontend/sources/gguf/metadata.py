"""Typed access to the metadata of a GGUF file: what is missing or absurd is refused by key."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from ....ir.errors import CheckpointError
from .header import AGAIN, Value

MAX_COUNT: Final = 1 << 24
"""More than any size of a model: beyond it a number is a mistake, and would cost memory."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """The metadata of a file. Keys that begin with a dot are those of its architecture.

    Every method raises CheckpointError, naming file and key.
    """

    values: Mapping[str, Value]
    path: Path
    architecture: str = ""
    read: set[str] = field(default_factory=set)
    """The keys that somebody asked for, so far."""

    def key(self, name: str) -> str:
        """The key as it stands in the file."""
        return self.architecture + name if name.startswith(".") else name

    def has(self, name: str) -> bool:
        """Whether the file has the key."""
        return self.get(name) is not None

    def get(self, name: str) -> Value | None:
        """The value as it is in the file; None where the key is missing."""
        self.read.add(self.key(name))
        return self.values.get(self.key(name))

    def error(self, name: str, message: str, hint: str | None = AGAIN) -> CheckpointError:
        """An error about a key."""
        return CheckpointError(message, where=f"{self.path}: {self.key(name)}", hint=hint)

    def count(self, name: str, *, low: int = 1, high: int = MAX_COUNT) -> int:
        """A whole number; a list of one number for all layers, as some files have it, is that."""
        value = self._one(name, self._required(name))
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(name, f"is {_shown(value)}, expected {low} to {high}")
        return value

    def optional_count(self, name: str, *, low: int = 1, high: int = MAX_COUNT) -> int | None:
        """A whole number; None where the key is missing."""
        return self.count(name, low=low, high=high) if self.has(name) else None

    def number(self, name: str, default: float | None = None, *, zero: bool = False) -> float:
        """A finite number above 0 (with `zero`: or 0); `default` where the key is missing."""
        if default is not None and not self.has(name):
            return default
        value = self._required(name)
        number = -1.0
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = value
        if not 0 <= number <= sys.float_info.max or (number == 0 and not zero):
            expected = "a finite number, 0 or more" if zero else "a finite number above 0"
            raise self.error(name, f"is {_shown(value)}, expected {expected}")
        return number

    def flag(self, name: str, default: bool) -> bool:
        """True or false; `default` where the key is missing."""
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(name, f"is {_shown(value)}, expected true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A text; `default` where the key is missing."""
        if default is not None and not self.has(name):
            return default
        value = self._required(name)
        if not isinstance(value, bytes):
            raise self.error(name, f"is {_shown(value)}, expected a text")
        return self._decoded(name, value)

    def texts(self, name: str) -> list[str]:
        """A list of texts."""
        value = self._required(name)
        if not isinstance(value, list):
            raise self.error(name, f"is {_shown(value)}, expected a list of texts")
        return [self._decoded(name, one) for one in value]

    def numbers(self, name: str, length: int) -> Sequence[float] | None:
        """A list of `length` finite numbers; None where the key is missing."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) != length:
            raise self.error(name, f"is {_shown(value)}, expected {length} numbers")
        if not np.isfinite(value.astype(np.float64)).all():
            raise self.error(name, "holds NaN or infinity")
        numbers: list[float] = value.tolist()
        return numbers

    def _required(self, name: str) -> Value:
        value = self.get(name)
        if value is None:
            raise self.error(name, "is missing from the metadata")
        return value

    def _one(self, name: str, value: Value) -> Value:
        if not isinstance(value, np.ndarray) or not value.size:
            return value
        if (value != value[0]).any():
            raise self.error(name, "differs from layer to layer, which is not supported", None)
        first: int | float | bool = value[0].item()
        return first

    def _decoded(self, name: str, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(name, f"holds {raw[:40]!r}, which is not UTF-8") from None


def _shown(value: Value) -> str:
    if isinstance(value, np.ndarray | list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
