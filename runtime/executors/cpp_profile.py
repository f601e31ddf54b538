"""The profile of a generated library: its buffer, and the names of its entries."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import numpy as np

from ...ir.artifact import Artifact
from ...ir.errors import ArtifactError
from ...ir.manifest import CompiledProgram
from .base import ProfileEntry

FILE = "profile.json"
"""Lies beside the library; `codegen/cpp/profile.py` says what is in it."""


class CppProfile:
    """The array that a library adds its times to, with what each of its entries is."""

    def __init__(self, artifact: Artifact, program: CompiledProgram, library: ctypes.CDLL) -> None:
        place = (artifact.path / program.entry.file).with_name(FILE)
        try:
            self._entries: list[dict[str, Any]] = json.loads(place.read_text())["entries"]
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"the profile has no names: {error}", where=str(place)) from error
        if len(self._entries) != (marked := library.infc_num_profile()):
            raise ArtifactError(
                f"names {len(self._entries)} entries, and the library marks {marked}",
                where=str(place),
                hint="compile the model again",
            )
        self._times = np.zeros((len(self._entries), 2), dtype=np.int64)

    @property
    def num_entries(self) -> int:
        """How many statements are told apart."""
        return len(self._entries)

    @property
    def address(self) -> int:
        """Where the library adds nanoseconds and times, as pairs."""
        return int(self._times.ctypes.data)

    def entries(self) -> list[ProfileEntry]:
        """The entries with what was added until now, in the order of a step."""
        return [
            ProfileEntry(entry["name"], tuple(entry["nodes"]), int(time), int(count))
            for entry, (time, count) in zip(self._entries, self._times, strict=True)
        ]
