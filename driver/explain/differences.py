"""How two programs, artifacts or rows of dumps differ, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .facts import Costs, PassFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something with a name that is not the same on both sides; None where it is not there."""

    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpChange:
    """How many nodes of an op each side has, where they differ."""

    op: str
    before: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hunk:
    """Lines of one part of the program: unchanged ones begin with a blank, others with - or +."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramDiff:
    """Two programs. Names of values do not count; `moved` values lie elsewhere in the arena.

    Costs are of one prompt of `tokens` tokens in a step, and of one token after as many.
    """

    nodes_before: int
    nodes_after: int
    ops: tuple[OpChange, ...]
    tokens: int
    costs_before: Costs
    costs_after: Costs
    hunks: tuple[Hunk, ...]
    moved: int

    @property
    def equal(self) -> bool:
        """Whether the two are the same program."""
        return not self.hunks and not self.moved


@dataclass(frozen=True, slots=True, kw_only=True)
class PassDiff:
    """A pass that did something else in the two compilations, or stands in one of them alone."""

    name: str
    before: PassFacts | None
    after: PassFacts | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDiff:
    """The programs after one pass; None where only one side ran it."""

    name: str
    program: ProgramDiff | None
    only_before: bool = False

    @property
    def equal(self) -> bool:
        """Whether both sides had the pass, and left the same program."""
        return self.program is not None and self.program.equal


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpsDiff:
    """Two directories of dumps, pass by pass."""

    stages: tuple[StageDiff, ...]

    @property
    def equal(self) -> bool:
        """Whether every stage is."""
        return all(stage.equal for stage in self.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherProgramDiff:
    """A program beside the main one that differs, or that one artifact alone has.

    Its stages are None where an artifact holds none.
    """

    name: str
    only: Literal["before", "after"] | None
    captured: ProgramDiff | None = None
    final: ProgramDiff | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactDiff:
    """Two artifacts: what their manifests, recipes, files and passes have not in common.

    `same_passes` is how many passes did the same in both. The programs are None where an
    artifact holds none; `others` are those beside the main one.
    """

    equal: bool
    manifest: tuple[Change, ...]
    recipe: tuple[Change, ...]
    files: tuple[Change, ...]
    passes: tuple[PassDiff, ...]
    same_passes: int
    captured: ProgramDiff | None
    final: ProgramDiff | None
    others: tuple[OtherProgramDiff, ...] = ()


Diff = ProgramDiff | DumpsDiff | ArtifactDiff
