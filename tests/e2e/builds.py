"""Checkpoints and artifacts that tests share: each is made once a run, by whom needs it first."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infc.ir.artifact import Artifact, open_artifact

from ..checkpoints import make_checkpoint
from ..configs import CONFIGS
from ..once import made_once
from .support import compile_checkpoint

Settings = tuple[tuple[str, Any], ...]
SEED = 7
_MAX_NAME = 120
INT8: Settings = (("quantization", "int8"), ("kv_cache.dtype", "int8"))
"""Matrices and the cache in int8."""
INT8_PRODUCTS: Settings = (("quantization", {"scheme": "int8", "embedding": "none"}), INT8[1])
"""The same, without the table of tokens."""
INT4: Settings = (("quantization", "int4"),)
"""Matrices in 4 bits."""
INT4_WEIGHTS: Settings = (("quantization", "int4-weights"), ("kv_cache.dtype", "float32"))
"""Matrices in 4 bits, and nothing else."""
PAIRS: Settings = (("passes", {"share-kv": {"factor": 2}}),)
"""The second of two layers reads the cache of the first."""


def quantized_alike(scheme: str, **others: Any) -> dict[str, Any]:
    """A `quantization` with a head that every backend has kernels for.

    Beside 4 bits, its default has 6 bits for `cpp` and `reference`, and 8 for others.
    """
    if scheme.startswith(("int4", "q4")) and not scheme.endswith("-token"):
        others.setdefault("head", "int8-weights" if scheme.endswith("-weights") else "int8")
    return {"scheme": scheme, **others}


@dataclass(frozen=True, slots=True)
class Build:
    """A small model and what it is compiled to.

    `dtype` is that of the checkpoint and of the computation; `sets` are further settings of the
    recipe, as `("quantization", "int8")`, and `changes` such of the model's configuration.
    """

    arch: str
    backend: str = "cpp"
    dtype: str = "float32"
    sets: Settings = ()
    changes: Settings = ()

    @property
    def model_name(self) -> str:
        """The checkpoint in a word."""
        return _slug(self.arch, self.dtype, *self.changes)

    @property
    def name(self) -> str:
        """All of it in a word."""
        return _slug(self.model_name, self.backend, *self.sets)


def _slug(*parts: Any) -> str:
    words = ["=".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in parts]
    slug = re.sub(r"[^\w.=-]+", "_", "+".join(words).replace("+", "--"))
    digest = hashlib.sha256(slug.encode()).hexdigest()
    return slug if len(slug) <= _MAX_NAME else f"{slug[:_MAX_NAME]}-{digest[:16]}"


@dataclass(frozen=True, slots=True)
class Builds:
    """A directory of them, which the workers of one run share."""

    root: Path

    def checkpoint(self, build: Build) -> Path:
        """The checkpoint of a build."""

        def make(place: Path) -> None:
            changes = dict(build.changes)
            make_checkpoint(build.arch, place, seed=SEED, dtype=build.dtype, **changes)

        return made_once(self.root / "checkpoints" / build.model_name, make)

    def artifact(self, build: Build) -> Artifact:
        """The artifact of a build."""

        def make(place: Path) -> None:
            sets = {"runtime.max_context": CONFIGS[build.arch].max_context, **dict(build.sets)}
            checkpoint = self.checkpoint(build)
            compile_checkpoint(checkpoint, place, backend=build.backend, dtype=build.dtype, **sets)

        return open_artifact(made_once(self.root / "artifacts" / build.name, make), "none")
