"""From an artifact to its facts: the manifest, the program, the report, and the memory plan."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ...ir.analyses import total_cost
from ...ir.artifact import Artifact, open_artifact
from ...ir.errors import ArtifactError, UsageError
from ...ir.gpus import GPUS
from ...ir.manifest import MAIN, folder_of
from ...ir.nearest import did_you_mean
from ...ir.program import Program
from ...ir.roofline import Ceilings
from ...ir.text import parse_program
from ...runtime.limits import handed_over_bytes
from .facts import (
    ArtifactFacts,
    NearMissFacts,
    OtherProgramFacts,
    PassCost,
    PassFacts,
    ProgramFacts,
    Workload,
)
from .launches import launch_facts
from .measure import choose_workload, fitted_workload, measure_program
from .memory import group_facts, plan_memory
from .predict import predict_steps

STAGES = {"captured": "captured.ir", "final": "program.ir"}
"""The stages of a program that an artifact holds, and their files."""

_OLD_NEAR_MISS = re.compile(
    r"(?:%(\S+?)(?:, %\S+)* = )?(\w+)(?: of layer (\d+))?(?: \(.*?\))?: (.*)", re.DOTALL
)
"""A near miss in reports of before: first result, op, layer and source of a node, and a reason."""


def inspect_artifact(
    artifact: Artifact | str | os.PathLike[str],
    *,
    batch: int | None = None,
    context: int | None = None,
    tokens: int | None = None,
    memory: int | None = None,
    ceilings: Ceilings | None = None,
) -> ArtifactFacts:
    """The contents and costs of an artifact; needs neither torch nor a compiler.

    Costs are given for a decode step with `batch` sequences (default 1), and for a prefill step
    with `tokens` tokens of a prompt (default: a full step), both with `context` tokens in the KV
    cache (default: the maximum). `memory` is in bytes; the default is the free memory of this
    machine. With `ceilings`, the result contains the minimum time of each op. For an artifact for
    GPUs, both are by default those of a GPU of its target. Raises UsageError
    for values above the compiled limits, and ArtifactError if the artifact is damaged.
    """
    if not isinstance(artifact, Artifact):
        artifact = open_artifact(artifact)
    manifest = artifact.manifest
    where, gpu = "this machine's ceilings", GPUS.get(manifest.target.name)
    if gpu is not None:
        where = f"the ceilings of NVIDIA's {gpu.name} ({gpu.source})"
        ceilings, memory = gpu.ceilings, gpu.memory_bytes if memory is None else memory
    workload = choose_workload(manifest.main.limits, batch, context, tokens)
    report, passes = _report_and_passes(artifact, MAIN)
    final, predictions = _program_if_there(artifact, MAIN, "final"), None
    if final is not None and ceilings is not None:
        predictions = predict_steps(final, workload, ceilings, where)
    return ArtifactFacts(
        path=str(artifact.path),
        identity=artifact.identity,
        manifest=manifest,
        workload=workload,
        program=_program_facts(artifact, MAIN, workload, report, passes),
        passes=passes,
        verification=tuple(report.get("verification", ())),
        certificate=report.get("certificate"),
        memory=plan_memory(manifest, workload.context, memory),
        predictions=predictions,
        launches=launch_facts(artifact, final, predictions),
        others=tuple(_other(artifact, n, workload) for n in sorted(manifest.programs) if n != MAIN),
    )


def _other(artifact: Artifact, name: str, workload: Workload) -> OtherProgramFacts:
    manifest, compiled = artifact.manifest, artifact.manifest.programs[name]
    fitted = fitted_workload(compiled.limits, workload)
    report, passes = _report_and_passes(artifact, name)
    return OtherProgramFacts(
        name=name,
        workload=fitted,
        weights_bytes=manifest.files[compiled.weights.file].bytes,
        num_tensors=len(compiled.weights.tensors),
        num_shared=len(compiled.weights.shared),
        handed_over_bytes=handed_over_bytes(compiled, compiled.limits.step_tokens),
        groups=group_facts(compiled.resources),
        program=_program_facts(artifact, name, fitted, report, passes),
        passes=passes,
        verification=tuple(report.get("verification", ())),
    )


def read_program(artifact: Artifact, stage: str = "final") -> Program:
    """The program of a stage; UsageError where there is no such stage, or it was not kept.

    A stage is that of the main program, or `PROGRAM:STAGE`; the name of another program alone
    stands for its final stage.
    """
    source = str(artifact.path / _file_of(artifact, stage))
    return parse_program(program_text(artifact, stage), source=source)


def program_text(artifact: Artifact, stage: str = "final") -> str:
    """The IR text of a stage (see `read_program`)."""
    name = _file_of(artifact, stage)
    if name not in artifact.manifest.files:
        raise UsageError(f"it contains no {name}", where=str(artifact.path))
    return (artifact.path / name).read_text(encoding="utf-8")


def _file_of(artifact: Artifact, spelled: str) -> str:
    programs = artifact.manifest.programs
    name, colon, stage = spelled.rpartition(":")
    if not colon and spelled in programs:
        name, stage = spelled, "final"
    if stage not in STAGES or (name or MAIN) not in programs:
        raise _no_stage(programs, spelled)
    return stage_file(name or MAIN, stage)


def _no_stage(known: Collection[str], spelled: str) -> UsageError:
    """What is wrong with a stage that an artifact does not have; the names that it has."""
    programs = [MAIN, *sorted(set(known) - {MAIN})]
    name, _, stage = spelled.rpartition(":")
    if not name:
        message, near = f"no program or stage {spelled!r}", did_you_mean(spelled, programs)
        near = near or did_you_mean(spelled, STAGES)
    elif name in programs:
        message, near = f"no stage {stage!r} of {name}", did_you_mean(stage, STAGES)
    else:
        message, near = f"no program {name!r}", did_you_mean(name, programs)
    which = "each with" if len(programs) > 1 else "with"
    has = f"it has {' and '.join(programs)}, {which} {' and '.join(STAGES)}"
    has += "; `infc compile --dump-ir-after all` writes more"
    return UsageError(message, hint=has if near is None else f"{near} {has}")


def stage_file(name: str, stage: str) -> str:
    """The file of a stage of the program of that name."""
    return folder_of(name) + STAGES[stage]


def _program_if_there(artifact: Artifact, name: str, stage: str) -> Program | None:
    is_there = stage_file(name, stage) in artifact.manifest.files
    return read_program(artifact, f"{name}:{stage}") if is_there else None


def _program_facts(
    artifact: Artifact,
    name: str,
    workload: Workload,
    report: Mapping[str, Any],
    passes: Iterable[PassFacts],
) -> ProgramFacts | None:
    program = _program_if_there(artifact, name, "final")
    if program is None:
        return None
    makers = {
        label: one["name"] for one in report.get("passes", ()) for label in one.get("made", ())
    }
    misses = (miss for one in passes for miss in one.near_misses)
    return measure_program(program, workload, makers, misses)


def _report_and_passes(
    artifact: Artifact, name: str
) -> tuple[Mapping[str, Any], tuple[PassFacts, ...]]:
    report = _report(artifact, f"{folder_of(name)}report.json")
    captured = _program_if_there(artifact, name, "captured")
    return report, tuple(pass_facts(report, captured))


def _report(artifact: Artifact, name: str) -> Mapping[str, Any]:
    if name not in artifact.manifest.files:
        return {}
    path = artifact.path / name
    report = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict):
        raise ArtifactError("not a report: expected an object", where=str(path))
    return report


def pass_facts(report: Mapping[str, Any], captured: Program | None) -> Iterable[PassFacts]:
    """What each pass did, from a report's plain data; `captured` is what the first was given."""
    nodes = cost = ops = None
    if captured is not None:
        nodes = len(captured.nodes)
        ops = Counter(node.op for node in captured.nodes)
        total = total_cost(captured, {n: bound.high for n, bound in captured.symbols.items()})
        cost = PassCost(total.bytes_read, total.bytes_written, total.flops)
    for entry in report.get("passes", ()):
        after = PassCost(entry["bytes_read"], entry["bytes_written"], entry["operations"])
        left = Counter(entry["ops"]) if "ops" in entry else None
        yield PassFacts(
            name=entry["name"],
            phase=entry["phase"],
            contract=entry.get("contract"),
            options=entry.get("options", {}),
            matches=entry["matches"],
            near_misses=tuple(_near_miss(entry["name"], one) for one in entry["near_misses"]),
            nodes_before=nodes,
            nodes=entry["nodes"],
            op_changes=None if left is None or ops is None else _changes(ops, left),
            before=cost,
            after=after,
            verified=entry["verified"],
            distance=entry.get("distance"),
        )
        nodes, cost, ops = entry["nodes"], after, left


def _changes(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    names = sorted({*before, *after})
    changes = {name: after.get(name, 0) - before.get(name, 0) for name in names}
    return {name: change for name, change in changes.items() if change}


def _near_miss(pass_name: str, entry: Mapping[str, Any] | str) -> NearMissFacts:
    """As a report records it; those of older artifacts are text."""
    if isinstance(entry, str):
        found = _OLD_NEAR_MISS.fullmatch(entry)
        label, op, layer, reason = found.groups() if found else (None, None, None, entry)
        if label is None and layer is None:
            return NearMissFacts(pass_name=pass_name, node=None, layer=None, reason=entry)
        node, number = label or f"{op}:{layer}", None if layer is None else int(layer)
        return NearMissFacts(pass_name=pass_name, node=node, layer=number, reason=reason)
    node, where, reason = entry["node"], entry["where"], entry["reason"]
    if node is None and where is not None:
        reason = f"{where}: {reason}"
    return NearMissFacts(pass_name=pass_name, node=node, layer=entry["layer"], reason=reason)
