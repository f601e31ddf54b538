"""Captures that tests share: a model that was traced once is read back afterwards.

Tracing takes four fifths of compiling a small model, and most models are compiled for several
backends and schemes. A capture is kept under a digest of all that it is made of: checkpoint,
configuration and our own code; of the checkpoint names and types count, and a capture that read
values as well is not kept. Tests of the frontend trace for themselves, as do commands that
tests start.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import infc
from infc.frontend.checkpoint import Checkpoint
from infc.ir.program import Program
from infc.ir.text import parse_program, print_program
from infc.ir.types import DType
from infc.ir.weights import leaves

from .once import made_once

if TYPE_CHECKING:
    import torch

Log = Callable[[str], None]
Capture = Callable[[Any, Checkpoint | None, DType, int, Log], Program]
"""As `load._capture`."""

PROGRAM, CONSTANTS, LINES = "program.ir", "constants.safetensors", "log.json"


@dataclass(frozen=True, slots=True)
class Captures:
    """A directory of captured programs, for any number of processes at once."""

    root: Path
    capture: Capture

    def run(
        self, config: Any, checkpoint: Checkpoint | None, compute: DType, context: int, log: Log
    ) -> Program:
        """Capture, or read what the same capture gave before; `log` hears the same lines."""
        if checkpoint is None or hasattr(config, "auto_map"):  # code that the digest doesn't cover
            return self.capture(config, checkpoint, compute, context, log)
        watched = _Watched(
            **{field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}
        )

        def make(place: Path) -> None:
            lines: list[str] = []
            program = self.capture(config, watched, compute, context, lines.append)
            if watched.read:
                raise _DependsOnValues(program, lines)
            _write(program, lines, place)

        try:
            place = made_once(self.root / _digest(config, checkpoint, compute, context), make)
        except _DependsOnValues as found:
            for line in found.lines:
                log(line)
            return found.program
        os.utime(place)
        for line in json.loads((place / LINES).read_text()):
            log(line)
        return _read(place)


@dataclass(frozen=True, slots=True)
class _Watched(Checkpoint):
    """Says which tensors were read."""

    read: list[str] = field(default_factory=list)

    def tensor(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return Checkpoint.tensor(self, name)


@dataclass
class _DependsOnValues(Exception):
    program: Program
    lines: list[str]


def _write(program: Program, lines: list[str], place: Path) -> None:
    from safetensors.torch import save_file

    text = print_program(program)
    assert parse_program(text) == replace(program, loaders={})
    place.mkdir()
    (place / PROGRAM).write_text(text)
    (place / LINES).write_text(json.dumps(lines))
    found = [leaf for weight in program.weights.values() for leaf in leaves(weight.expr)]
    keys = {str(leaf.attrs["key"]) for leaf in found if leaf.op == "data"}
    save_file({key: program.loaders["data"](key).clone() for key in keys}, place / CONSTANTS)


def _read(place: Path) -> Program:
    from safetensors.torch import load_file

    constants = load_file(place / CONSTANTS)
    program = parse_program((place / PROGRAM).read_text())
    return replace(program, loaders={"data": constants.__getitem__})


@functools.cache
def _code() -> str:
    """Of what makes a captured program: our own code, and the libraries that trace."""
    import torch
    import transformers

    rooms = Path(infc.__file__).parent
    paths = sorted(path for room in ("frontend", "ir") for path in (rooms / room).rglob("*.py"))
    digest = hashlib.sha256("\0".join(path.read_text() for path in paths).encode())
    versions = (torch.__version__, transformers.__version__, platform.python_version())
    return f"{digest.hexdigest()} {versions}"


def _digest(config: Any, checkpoint: Checkpoint, compute: DType, context: int) -> str:
    settings = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    digest = hashlib.sha256(repr((_code(), type(config).__name__, compute, context)).encode())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(
        repr(sorted((name, str(kind)) for name, kind in checkpoint.types.items())).encode()
    )
    digest.update(repr(sorted((checkpoint.parameters or {}).items())).encode())
    return digest.hexdigest()[:24]
