"""The tensors of a model by name, and those of a directory: safetensors, whole or in shards."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from ..ir.errors import CheckpointError
from ..ir.program import WeightExpr, WeightLoader
from ..ir.safetensors import MappedSafetensors
from ..ir.types import DType, TensorType
from ..ir.weights import checkpoint as checkpoint_leaf
from .config import read_json

if TYPE_CHECKING:
    import torch

_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
# The first number of a name is that of its layer, whatever the layers are called.
_LAYER: Final = re.compile(r"(?:^|\.)(\d{1,9})\.")
# Some models count the parts of a published layer as layers; none has as many parts as this.
_SUBLAYERS: Final = 4
_PICKLES: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class TensorFile(Protocol):
    """A mapped file of tensors."""

    path: Path

    def tensor(self, name: str) -> torch.Tensor:
        """The values of a tensor, which nobody may write to."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Published tensors by name: their types, and the mapped file that holds each.

    `path` is the directory or file of the model. `parameters` says how the model's parameters are
    made of the tensors, where these do not have the names and layouts that the library reads.
    `stored_as` names the format that most weights lie in, where it is no element type;
    `described_by` is what the configuration was read from, for messages. `packed` reads the codes
    of a tensor that is stored in one of `GGUF_FORMATS`.
    """

    path: Path
    types: Mapping[str, TensorType]
    files: Mapping[str, TensorFile]
    parameters: Mapping[str, WeightExpr] | None = None
    stored_as: str | None = None
    described_by: str = "config.json"
    packed: WeightLoader | None = None

    def tensor(self, name: str) -> torch.Tensor:
        """A read-only view of a published tensor; CheckpointError where there is none."""
        if name not in self.files:
            raise CheckpointError(f"tensor {name} is missing", where=str(self.path))
        return self.files[name].tensor(name)

    def published(self) -> Mapping[str, WeightExpr]:
        """What the library is given, by the names that it knows: parameters, or the tensors."""
        if self.parameters is not None:
            return self.parameters
        return {name: checkpoint_leaf(name, kind) for name, kind in self.types.items()}

    def loaders(self) -> dict[str, WeightLoader]:
        """What reads the tensors for a program, by the leaves of its weight expressions."""
        loaders: dict[str, WeightLoader] = {"checkpoint": self.tensor}
        return loaders if self.packed is None else {**loaders, "packed": self.packed}

    def where(self, name: str) -> str:
        """The file and name of a tensor, for messages."""
        return f"{self.files[name].path.name}: {name}"

    def main_dtype(self) -> DType:
        """The floating-point type that most of the weights' elements have."""
        counts: Counter[DType] = Counter()
        for kind in self.types.values():
            if kind.dtype.is_float:
                counts[kind.dtype] += kind.num_elements()
        if not counts:
            raise CheckpointError("holds no floating-point weights", where=str(self.path))
        return counts.most_common(1)[0][0]

    def check_layers(self, num_layers: int) -> None:
        """Refuses far more layers than there are tensors for, before a model of them is built.

        A smaller difference is left to the check of all names. Raises CheckpointError.
        """
        found = (_LAYER.search(name) for name in self.types)
        stored = max((int(match[1]) + 1 for match in found if match), default=num_layers)
        if num_layers > _SUBLAYERS * stored:
            raise CheckpointError(
                f"num_hidden_layers is {num_layers}, but the weights are of {stored} layers",
                where=str(self.path / "config.json"),
                hint="correct num_hidden_layers, or download the weights again",
            )


def open_checkpoint(directory: Path) -> Checkpoint:
    """Maps the weights of a checkpoint directory and checks every header.

    Raises CheckpointError, naming file and tensor, for files that are missing, damaged or
    contradict the index.
    """
    if (directory / _SINGLE).exists():
        return _combine(directory, [_map(directory / _SINGLE)])
    if (directory / _INDEX).exists():
        return _open_shards(directory)
    if any((directory / name).exists() for name in _PICKLES):
        raise CheckpointError(
            "the weights are stored with pickle, which infc does not load",
            where=str(directory),
            hint="save the model again as safetensors",
        )
    raise CheckpointError(f"has neither {_SINGLE} nor {_INDEX}", where=str(directory))


def _map(path: Path) -> MappedSafetensors:
    return MappedSafetensors(path, give_back=True)  # each tensor is read once, or a few times


def _open_shards(directory: Path) -> Checkpoint:
    path = directory / _INDEX
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError("has no weight_map", where=str(path))
    for name, shard in placed.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard[:1] in ("", "."):
            raise CheckpointError(
                f"puts {name} in {shard!r}, which is not a file name", where=str(path)
            )
        if not (directory / shard).is_file():
            raise CheckpointError(f"shard {shard}, which holds {name}, is missing", where=str(path))
    shards = {shard: _map(directory / shard) for shard in sorted(set(placed.values()))}
    checkpoint = _combine(directory, list(shards.values()))
    for name, shard in placed.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"puts {name} in {shard}, which does not contain it", where=str(path)
            )
    for name in checkpoint.types:
        if name not in placed:
            raise CheckpointError(f"does not list {checkpoint.where(name)}", where=str(path))
    return checkpoint


def _combine(directory: Path, files: list[MappedSafetensors]) -> Checkpoint:
    types: dict[str, TensorType] = {}
    owners: dict[str, MappedSafetensors] = {}
    for file in files:
        for name in file.names():
            if name in owners:
                raise CheckpointError(
                    f"is in {owners[name].path.name} as well", where=f"{file.path}: {name}"
                )
            try:
                types[name] = file.entry(name).type
            except CheckpointError as error:
                raise CheckpointError(error.message, where=f"{file.path}: {name}") from None
            owners[name] = file
    if not types:
        raise CheckpointError("holds no tensors", where=str(files[0].path))
    return Checkpoint(directory, types, owners)
