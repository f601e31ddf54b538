"""Compares two programs, two artifacts, or the dumps of two compilations."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ...ir.artifact import Artifact, open_artifact
from ...ir.errors import UsageError
from ...ir.manifest import MAIN, MANIFEST_NAME, FileDigest
from ...ir.program import Program
from ...ir.sizes import format_size
from ...ir.text import parse_program
from ..text_input import read_file
from .collect import STAGES, inspect_artifact, read_program, stage_file
from .differences import (
    ArtifactDiff,
    Change,
    Diff,
    DumpsDiff,
    Hunk,
    OpChange,
    OtherProgramDiff,
    PassDiff,
    ProgramDiff,
    StageDiff,
)
from .facts import NO_COSTS, Costs, PassFacts, Workload
from .listing import Listing, fold_layers, list_program, run_title
from .measure import node_costs

_DUMP = re.compile(r"(\d+)-(.+)\.ir")
_CONTEXT = 2


@dataclass(frozen=True, slots=True)
class Dumps:
    """The programs of `--dump-ir-after`, by pass, in the order they ran."""

    programs: tuple[tuple[str, Program], ...]


Side = Program | Artifact | Dumps


def diff_paths(before: str | os.PathLike[str], after: str | os.PathLike[str]) -> Diff:
    """Compares files of IR text, artifacts, stages of these, or directories of dumps.

    A stage is `ARTIFACT:STAGE`, or of another program `ARTIFACT:PROGRAM:STAGE`.

    If one side is a program and the other an artifact, the final program of the artifact is used.
    Raises UsageError if a path cannot be read or compared, and ArtifactError or ParseError if it
    is damaged.
    """
    a, b = read_side(before), read_side(after)
    if isinstance(a, Artifact) and isinstance(b, Artifact):
        return diff_artifacts(a, b)
    if isinstance(a, Dumps) and isinstance(b, Dumps):
        return diff_dumps(a, b)
    if isinstance(a, Dumps) or isinstance(b, Dumps):
        raise UsageError(
            "a directory of dumps can only be compared with another one",
            hint="name one of its files, or two directories",
        )
    programs = (read_program(one) if isinstance(one, Artifact) else one for one in (a, b))
    return diff_programs(*programs)


def read_side(where: str | os.PathLike[str]) -> Side:
    """What stands at a path (see `diff_paths`)."""
    path = Path(where)
    for colons in (1, 2):
        base, *parts = str(where).rsplit(":", colons)
        if len(parts) == colons and not path.exists() and Path(base).is_dir():
            return read_program(open_artifact(base), ":".join(parts))
    if path.is_dir():
        if (path / MANIFEST_NAME).exists():
            return open_artifact(path)
        if dumps := _dumps(path):
            return Dumps(dumps)
        raise UsageError("neither an artifact nor dumps of IR text", where=str(path))
    if not path.exists() and path.suffix != ".ir":
        return open_artifact(path)  # which says what is wrong, as for every other command
    return _read_text(path)


def _dumps(directory: Path) -> tuple[tuple[str, Program], ...]:
    found = sorted(
        (int(match[1]), match[2], path)
        for path in directory.iterdir()
        if (match := _DUMP.fullmatch(path.name))
    )
    return tuple((name, _read_text(path)) for _, name, path in found)


def _read_text(path: Path) -> Program:
    return parse_program(read_file(str(path)), source=str(path))


def diff_programs(before: Program, after: Program) -> ProgramDiff:
    """Two programs: nodes, costs, and lines; equal but for names of values is equal."""
    a, b = list_program(before), list_program(after)
    counts = [Counter(node.op for node in one.nodes) for one in (before, after)]
    ops = (
        OpChange(op=op, before=counts[0][op], after=counts[1][op])
        for op in sorted({*counts[0], *counts[1]})
    )
    tokens = min(_most_tokens(before), _most_tokens(after))
    return ProgramDiff(
        nodes_before=len(before.nodes),
        nodes_after=len(after.nodes),
        ops=tuple(change for change in ops if change.before != change.after),
        tokens=tokens,
        costs_before=_costs(before, tokens),
        costs_after=_costs(after, tokens),
        hunks=tuple(_hunks(a, b)),
        moved=len(set(a.plan) ^ set(b.plan)) if a.plan and b.plan else 0,
    )


def _most_tokens(program: Program) -> int:
    """The tokens of the longest prompt that one step takes."""
    largest = program.symbols["T"].high if "T" in program.symbols else 1
    return min(largest, program.spec.max_context or largest)


def _costs(program: Program, tokens: int) -> Costs:
    """A step of one new prompt of so many tokens, and one token after as many."""
    load = Workload(batch=1, context=tokens, tokens=tokens)
    return sum((node_costs(program, node, load) for node in program.nodes), NO_COSTS)


def _hunks(a: Listing, b: Listing) -> Iterator[Hunk]:
    yield from _hunk("the program", a.head, b.head)
    yield from _hunk("before the layers", a.before, b.before)
    yield from _layer_hunks(a.layers, b.layers)
    yield from _hunk("after the layers", a.after, b.after)


Lines = tuple[str, ...]


def _layer_hunks(a: Sequence[Lines], b: Sequence[Lines]) -> Iterator[Hunk]:
    """Layers side by side; pairs that are equal to each other on both sides once."""
    if len(a) == len(b):
        pairs = list(zip(a, b, strict=True))
        for run in fold_layers(pairs):
            for layer in run.shown:
                yield from _hunk(run_title(run, layer), *pairs[layer])
        return
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    for tag, first, last, start, stop in matcher.get_opcodes():
        if tag != "equal":
            yield from _unlike(a[first:last], b[start:stop], first, start)


def _unlike(a: Sequence[Lines], b: Sequence[Lines], first: int, start: int) -> Iterator[Hunk]:
    """Stretches of layers that have no equal on the other side: pairs, then those left alone."""
    pairs = list(zip_longest(a, b, fillvalue=()))
    for run in fold_layers(pairs):
        for place in run.shown:
            old, new = pairs[place]
            count = len(run.members(place))
            times = f", {count} times" if count > 1 else ""
            where = f"layer {first + place} and layer {start + place}"
            if not old or not new:
                which = f"layer {first + place}" if old else f"layer {start + place}"
                where = f"{which}, {'before' if old else 'after'} alone"
            yield from _hunk(where + times, old, new)


def _hunk(title: str, a: Lines, b: Lines) -> Iterator[Hunk]:
    if a == b:
        return
    lines = list(difflib.unified_diff(a, b, lineterm="", n=_CONTEXT))[2:]
    kept = ["..." if line.startswith("@@") else line for line in lines]
    yield Hunk(title=title, lines=tuple(kept[1:]))


def diff_dumps(before: Dumps, after: Dumps) -> DumpsDiff:
    """Pass by pass, aligned by name."""
    stages: list[StageDiff] = []
    names = [[name for name, _ in side.programs] for side in (before, after)]
    for i, j in _align(*names):
        if i is None or j is None:
            side, place = (before, i) if i is not None else (after, j)
            assert place is not None
            name = side.programs[place][0]
            stages.append(StageDiff(name=name, program=None, only_before=i is not None))
        else:
            (name, a), (_, b) = before.programs[i], after.programs[j]
            stages.append(StageDiff(name=name, program=diff_programs(a, b)))
    return DumpsDiff(stages=tuple(stages))


def _align(a: Sequence[str], b: Sequence[str]) -> Iterator[tuple[int | None, int | None]]:
    """Places of equal names side by side; None where the other side lacks one."""
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    for tag, first, last, start, stop in matcher.get_opcodes():
        if tag == "equal":
            yield from zip(range(first, last), range(start, stop), strict=True)
        else:
            yield from ((i, None) for i in range(first, last))
            yield from ((None, j) for j in range(start, stop))


def diff_artifacts(before: Artifact, after: Artifact) -> ArtifactDiff:
    """What two artifacts have not in common; equal ones have equal manifests, byte for byte."""
    texts = [json.loads(one.manifest.to_text()) for one in (before, after)]
    recipes = [text.pop("recipe") for text in texts]
    both = before.manifest.programs.keys() & after.manifest.programs.keys()
    for text in texts:
        del text["files"], text["digest"]
        text["programs"] = {name: text["programs"][name] for name in both}
    passes = [inspect_artifact(one).passes for one in (before, after)]
    changed = tuple(_pass_diffs(*passes))
    common = sum(1 for i, j in _align(*_names(passes)) if i is not None and j is not None)
    return ArtifactDiff(
        equal=before.identity == after.identity,
        manifest=tuple(_changes(*map(_flatten, texts))),
        recipe=tuple(_changes(*map(_flatten, recipes))),
        files=tuple(_changes(*(_files(one.manifest.files) for one in (before, after)))),
        passes=changed,
        same_passes=common - sum(1 for one in changed if one.before and one.after),
        captured=_stage(before, after, MAIN, "captured"),
        final=_stage(before, after, MAIN, "final"),
        others=tuple(_others(before, after)),
    )


def _others(before: Artifact, after: Artifact) -> Iterator[OtherProgramDiff]:
    a, b = before.manifest.programs, after.manifest.programs
    for name in sorted({*a, *b} - {MAIN}):
        if name not in b or name not in a:
            yield OtherProgramDiff(name=name, only="before" if name in a else "after")
            continue
        stages = {stage: _stage(before, after, name, stage) for stage in STAGES}
        if any(one is not None and not one.equal for one in stages.values()):
            yield OtherProgramDiff(name=name, only=None, **stages)


def _stage(before: Artifact, after: Artifact, name: str, stage: str) -> ProgramDiff | None:
    if any(stage_file(name, stage) not in one.manifest.files for one in (before, after)):
        return None
    spelled = f"{name}:{stage}"
    return diff_programs(read_program(before, spelled), read_program(after, spelled))


def _names(passes: Sequence[Sequence[PassFacts]]) -> list[list[str]]:
    return [[one.name for one in side] for side in passes]


def _pass_diffs(a: Sequence[PassFacts], b: Sequence[PassFacts]) -> Iterator[PassDiff]:
    for i, j in _align(*_names((a, b))):
        old = None if i is None else a[i]
        new = None if j is None else b[j]
        if old != new:
            some = old or new
            assert some is not None
            yield PassDiff(name=some.name, before=old, after=new)


def _flatten(data: Any, prefix: str = "") -> dict[str, str]:
    """Leaves of JSON by path; lists of plain values are leaves."""
    if isinstance(data, Mapping):
        pairs = ((f"{prefix}.{key}" if prefix else str(key), value) for key, value in data.items())
    elif isinstance(data, list) and any(isinstance(item, (dict, list)) for item in data):
        pairs = ((f"{prefix}[{place}]", value) for place, value in enumerate(data))
    else:
        return {prefix: json.dumps(data)}
    return {path: text for name, value in pairs for path, text in _flatten(value, name).items()}


def _files(files: Mapping[str, FileDigest]) -> dict[str, str]:
    return {
        name: f"{format_size(one.bytes)}, {(one.sha256 or (one.chunks or ('?',))[0])[:12]}"
        for name, one in files.items()
    }


def _changes(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Change]:
    for name in {**a, **b}:
        if a.get(name) != b.get(name):
            yield Change(name=name, before=a.get(name), after=b.get(name))
