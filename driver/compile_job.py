"""What a compilation is of: the recipe with everything resolved, and its name in the cache."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..codegen.base import Backend
from ..codegen.registry import get_backend
from ..ir.backends import is_built_in, known_backends
from ..ir.errors import ArtifactError, UsageError
from ..ir.resources import is_coded
from ..ir.schemes import INT8, SCHEMES, Scheme
from ..ir.targets import Target
from .accuracy_text import read_evaluation
from .added_programs import AddedProgram
from .cache import cache_key
from .calibration import recipe_text
from .model_source import find_model
from .optimize import CACHE_DTYPES, DTYPES
from .progress import Reporter
from .recipe import LoadedRecipe, Recipe
from .texts import Text


@dataclass(frozen=True, slots=True)
class Dumps:
    """The pass after which programs are written (`all`: after each; None: after none), where."""

    after: str | None
    directory: Path


@dataclass(frozen=True, slots=True)
class CompileJob:
    """A recipe with everything resolved that needs no heavy import."""

    loaded: LoadedRecipe
    model: Path
    output: Path
    backend: Backend
    target: Target
    toolchain: Mapping[str, str]
    verify: bool
    text: Text
    calibration_text: Text | None
    programs: Mapping[str, AddedProgram] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """What the recipe says."""
        return self.loaded.recipe

    @property
    def plan(self) -> str:
        """The text of the passes that the backend wants at the end of the pipeline."""
        return self.backend.plan_passes(self.target)


def plan_job(
    loaded: LoadedRecipe, output: str | os.PathLike[str] | None, verify: bool
) -> CompileJob:
    """The job of a recipe; ArtifactError if the output and the checkpoint contain each other."""
    recipe = loaded.recipe
    backend = get_backend(recipe.backend, recipe.model_dump())
    target = backend.find_target(recipe.target)
    _check_dtype(recipe.dtype, backend)
    _check_schemes(recipe.quantization.schemes, backend)
    _check_cache(recipe.kv_cache.dtype, backend)
    # A missing compiler is told now, not after minutes of work.
    toolchain = backend.toolchain(target)
    model = find_model(recipe, loaded.directory)
    place = Path(output) if output is not None else Path(f"{_model_name(recipe, model)}.infc")
    place = Path(os.path.abspath(place))
    if model == place or model in place.parents or place in model.parents:
        raise ArtifactError(
            "the output is inside the checkpoint, or contains it",
            where=str(place),
            hint="choose another directory with -o",
        )
    text, calibration = read_evaluation(loaded), recipe_text(loaded)
    if calibration is not None and calibration.sha256 == text.sha256:
        raise UsageError(
            f"{text.name} is also the text that the accuracy is measured on",
            where="quantization.calibration.text",
            hint="name another text here, or in accuracy.evaluation",
        )
    return CompileJob(loaded, model, place, backend, target, toolchain, verify, text, calibration)


def _check_dtype(name: str, backend: Backend) -> None:
    """UsageError for a type of matrices that the backend has no kernels for."""
    dtype = DTYPES.get(name)
    if dtype is not None and not backend.can_multiply(dtype):
        raise UsageError(
            f"the backend {backend.name} has no kernels for matrices in {name}",
            where="dtype",
            hint="choose bfloat16, or "
            + _settings(own for own in _own_backends() if own.can_multiply(dtype)),
        )


def _check_schemes(names: Set[str], backend: Backend) -> None:
    """UsageError for a scheme whose matrices the backend has no kernels for."""
    for scheme in SCHEMES.values():
        if scheme.name in names and not backend.can_hold(scheme.weight):
            raise UsageError(
                f"the backend {backend.name} has no kernels for matrices in {scheme.weight.name},"
                f" which the scheme {scheme.name} needs",
                where="quantization",
                hint=f"choose another scheme, such as {_like(scheme, backend)}, or "
                + _settings(own for own in _own_backends() if own.can_hold(scheme.weight)),
            )


def _like(scheme: Scheme, backend: Backend) -> str:
    """The scheme of as many bits that the backend has kernels for, where it is one of 4; or int8.

    Rows are quantized alike.
    """
    alike = (
        other.name
        for other in SCHEMES.values()
        if other.weight.bits == 4 and other.activations == scheme.activations
    )
    if scheme.weight.bits == 4:
        return next((n for n in alike if backend.can_hold(SCHEMES[n].weight)), INT8.name)
    return INT8.name


def _cache_like(stored: str, backend: Backend) -> str:
    """What a cache may consist of instead."""
    if not is_coded(stored):
        return "bfloat16, which takes as much memory"
    if backend.can_cache(CACHE_DTYPES["int8"]):
        return "int8, which takes as much memory"
    return "auto"


def _check_cache(dtype: str, backend: Backend) -> None:
    """UsageError for a KV cache that the backend has no kernels for."""
    stored = CACHE_DTYPES[dtype]
    if stored != "auto" and not backend.can_cache(stored):
        raise UsageError(
            f"the backend {backend.name} has no kernels for a KV cache in {dtype}",
            where="kv_cache.dtype",
            hint=f"choose {_cache_like(stored, backend)}, or "
            + _settings(own for own in _own_backends() if own.can_cache(stored)),
        )


def _own_backends() -> list[Backend]:
    return [get_backend(info.name) for info in known_backends() if is_built_in(info.name)]


def _settings(backends: Iterable[Backend]) -> str:
    """What chooses one of these backends; a GPU must be named, `sm_90` for example."""
    return " or ".join(
        f"--set backend={one.name}"
        + (f" --set target={one.example_target}" if one.example_target else "")
        for one in backends
    )


def _model_name(recipe: Recipe, model: Path) -> str:
    name = Path(recipe.model).name
    if name in ("", ".."):
        name = model.name  # `.` stands for the directory itself
    if model.is_file():
        return Path(name).stem
    if model.parent.name == "snapshots" and "--" in model.parent.parent.name:
        return model.parent.parent.name.rpartition("--")[2]  # of the hub: models--ORG--NAME
    # `checkpoint` says nothing of the model; the directory around it does.
    return model.parent.name or name if name in ("checkpoint", "model") else name


def job_key(job: CompileJob, progress: Reporter) -> str | None:
    """The name of this compilation in the cache; None where it must not be reused."""
    if not is_built_in(job.backend.name):
        progress.remark(f"not cached: {job.backend.name} is the backend of a plug-in")
        return None
    if job.programs:
        progress.remark("not cached: programs were added by a caller")
        return None
    if own := list(_own_passes(job)):
        # What a user's module imports, and so what it does, can't be known without running it.
        progress.remark(f"not cached: the recipe brings a pass of its own ({own[0]})")
        return None
    parts = {
        "recipe": recorded_recipe(job),
        "target": job.target.features,
        "toolchain": dict(job.toolchain),
        "verify": job.verify,
        "evaluation": job.text.sha256,
        "calibration": job.calibration_text and job.calibration_text.sha256,
    }
    return cache_key(parts, job.model)


def _own_passes(job: CompileJob) -> Iterator[str]:
    """Every pass of the recipe that is not infc's: of a module, or of a plug-in."""
    from ..passes.catalogue import OUR_PASSES
    from .optimize import build_recipe_pipeline

    if job.recipe.passes:
        ours = {kind.name for kind in OUR_PASSES}
        pipeline = build_recipe_pipeline(job.loaded, job.plan, job.backend.can_hold)
        yield from (name for name in pipeline.names() if name not in ours)


def recorded_recipe(job: CompileJob) -> dict[str, Any]:
    """The recipe as the manifest keeps it: every key, `native` by name, no path of this machine."""
    data = job.recipe.model_dump()
    data["accuracy"]["evaluation"] = job.text.name
    is_local = (job.loaded.directory / job.recipe.model).exists()
    name = _model_name(job.recipe, job.model) if is_local else job.recipe.model
    calibration = data["quantization"]["calibration"]
    calibration["text"] = Path(calibration["text"]).name
    return {**data, "model": name, "target": job.target.name}
