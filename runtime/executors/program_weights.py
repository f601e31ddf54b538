"""The weights of one of an artifact's programs: of its own file, and of the main program's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...ir.artifact import Artifact
from ...ir.errors import ArtifactError
from ...ir.manifest import CompiledProgram
from ...ir.safetensors import Entry, MappedSafetensors
from .base import WeightPlacement
from .weight_memory import CopiedWeights, LoadedWeights, open_weights

if TYPE_CHECKING:
    import torch

    Opened = CopiedWeights | MappedSafetensors


class ProgramWeights:
    """The tensors of a program by name; memory is given back by `close`.

    The file of the main program is opened for those that lie there. It is mapped, so that they
    take no memory a second time, unless others could write to it.
    """

    def __init__(
        self, artifact: Artifact, program: CompiledProgram, placement: WeightPlacement
    ) -> None:
        names = program.weights.shared
        self._own = _open(artifact, program.weights.file, placement)
        self._files = dict.fromkeys(self._own.entries, self._own)
        self._main: Opened | None = None
        if names:
            where: WeightPlacement = "mapped" if artifact.weights_are_ours() else "loaded"
            self._main = _open(artifact, artifact.manifest.main.weights.file, where)
            self._files.update({n: self._main for n in names if n in self._main.entries})
        self.entries: Mapping[str, Entry] = {n: one.entries[n] for n, one in self._files.items()}

    def address(self, name: str) -> int:
        """Where the tensor's first byte lies; ArtifactError where there is none."""
        return self._file(name).address(name)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, to be read only; not for weights that are copied beside the steps."""
        file = self._file(name)
        assert isinstance(file, MappedSafetensors)
        return file.tensor(name)

    def _file(self, name: str) -> Opened:
        if name not in self._files:
            raise ArtifactError("is not in the file", where=f"{self._own.path}: {name}")
        return self._files[name]

    def copy(self, seconds: float) -> bool:
        """Copy weights into huge pages for about so long; whether any are left to copy."""
        return isinstance(self._own, CopiedWeights) and self._own.copy(seconds)

    @property
    def taken_bytes(self) -> int:
        """What lies in memory of its own by now."""
        files = (self._own, self._main)
        kinds = (CopiedWeights, LoadedWeights)
        return sum(one.taken_bytes for one in files if isinstance(one, kinds))

    def close(self) -> None:
        """Give the memory back."""
        self._own.close()
        if self._main is not None:
            self._main.close()


def _open(artifact: Artifact, name: str, placement: WeightPlacement) -> Opened:
    handle = artifact.open_file(name)
    try:
        return open_weights(artifact.path / name, handle, placement)
    finally:
        os.close(handle)
