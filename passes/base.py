"""What a pass is: a frozen dataclass that turns one program into another and says what it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ..ir.errors import UsageError
from ..ir.nearest import did_you_mean
from ..ir.program import Program
from .near_miss import NearMiss
from .pattern_uses import PatternUses

if TYPE_CHECKING:
    from ..ir.targets import Target
    from .methods.calibration import Calibration

PIPELINE_PHASES: Final = ("canonicalize", "shard", "quantize", "fuse", "lower-kv", "plan")
"""Where a pass may stand, in order."""

CONTRACTS: Final = ("exact", "reassociates", "lossy")
"""What a pass does to numbers: nothing, another order of rounding, or a loss with a bound."""

REACHES: Final = {
    "canonicalize": "canonical",
    "shard": "canonical",
    "quantize": "quantized",
    "fuse": "fused",
    "lower-kv": "lowered",
    "plan": "planned",
}
"""The phase (`Program.phase`) that a program has reached when a phase of the pipeline is over."""


def _silent(line: str) -> None:
    """The log of a context that nobody listens to."""


@dataclass(frozen=True, slots=True)
class PassContext:
    """The target that a pass may use, and where its messages go.

    `calibration` is the text that a method of quantization may look at. With `patterns`, those of
    options need not match in this program, but in one of those that are compiled together.
    """

    target: Target | None = None
    log: Callable[[str], None] = _silent
    calibration: Calibration | None = None
    patterns: PatternUses | None = None

    def quietly(self) -> PassContext:
        """The same for passes that run once more, to be compared.

        Patterns have been found to be of use by then, and in a few of the layers some have none.
        """
        return replace(self, log=_silent, patterns=PatternUses())


@dataclass(frozen=True, slots=True)
class PassResult:
    """The rewritten program. If `matches` is 0, it is the same object as the input.

    A near miss that is of no node may be given as text. `details` is what else goes into the
    report, as plain data.
    """

    program: Program
    matches: int = 0
    near_misses: tuple[NearMiss | str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """A transformation of programs. The fields are its options.

    `requires` and `ensures` name facts (such as "unit-batch-squeezed"), with which the pipeline
    checks the order of passes before running any. `tolerance` limits the error of a lossy pass,
    relative to the largest magnitude of a row. `doc` is shown by `infc passes`. A pass that
    `fits_weights` makes new weights by what it knows of the model's inputs: on random ones they
    would say nothing, so it is whole runs that compare them.
    """

    name: ClassVar[str]
    phase: ClassVar[str]
    contract: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    tolerance: ClassVar[float] = 0.05
    fits_weights: ClassVar[bool] = False

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Returns the rewritten program and the matches; raises PassError if it fails."""
        raise NotImplementedError(f"{type(self).__name__} has no run method")

    @property
    def allowed_error(self) -> float:
        """The allowed error of a lossy pass: its tolerance, unless its options override it."""
        return self.tolerance

    @property
    def reads_text(self) -> bool:
        """Whether the pass looks at the calibration text, and says how far it has got."""
        return False

    def option_values(self) -> dict[str, Any]:
        """The values of the options, by name."""
        return {option.name: getattr(self, option.name) for option in fields(self)}

    def spell(self) -> str:
        """The pass as pipeline text: its name, and the options with non-default values."""
        changed = [
            f"{option.name}={spell_option(getattr(self, option.name))}"
            for option in fields(self)
            if getattr(self, option.name) != option.default
        ]
        return f"{self.name}{{{','.join(changed)}}}" if changed else self.name


def phases_ending(passes: Sequence[Pass]) -> list[str | None]:
    """For each pass the phase of the pipeline that is over after it, if any.

    A pass that stands again in a later phase does not end that phase.
    """
    ranks = list(accumulate((PIPELINE_PHASES.index(one.phase) for one in passes), max))
    return [
        PIPELINE_PHASES[rank] if rank != later else None
        for rank, later in zip(ranks, [*ranks[1:], None], strict=False)
    ]


def spell_option(value: Any) -> str:
    """An option's value as pipeline text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def make_pass(kind: type[Pass], options: Mapping[str, Any]) -> Pass:
    """Creates a pass with these options; UsageError for an unknown option or a wrong type."""
    known = {option.name: option for option in fields(kind)}
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known, f"it has: {', '.join(known) or 'none'}")
            raise UsageError(f"pass {kind.name} has no option {name}", hint=hint)
    given = {name: _as_declared(known[name].type, value) for name, value in options.items()}
    for name, value in given.items():
        _check_option(kind.name, name, str(known[name].type), value)
    return kind(**given)


def _as_declared(annotation: Any, value: Any) -> Any:
    """A whole number for a float option is that float, however somebody wrote it.

    The word `none`, which pipeline text reads as no value, is a text where an option is one.
    """
    if value is None and annotation == "str":
        return "none"
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and annotation == "float" else value


_OPTION_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
}


def _check_option(owner: str, name: str, annotation: str, value: Any) -> None:
    """UsageError unless `value` is of the option's annotated type (`int`, `str | None`, ...)."""
    kinds = [_OPTION_TYPES.get(part.strip()) for part in annotation.split("|")]
    if None in kinds:
        return
    allowed = {kind for group in kinds if group for kind in group}
    if isinstance(value, bool) and bool not in allowed:
        allowed.discard(int)
        allowed.discard(float)
    if not isinstance(value, tuple(allowed)) or not allowed:
        raise UsageError(f"option {name} of pass {owner} is {value!r}, expected {annotation}")


def finish(
    before: Program,
    after: Program,
    matches: int,
    near_misses: tuple[NearMiss | str, ...] = (),
) -> PassResult:
    """Creates the result of a pass; returns the original program if nothing changed."""
    if matches == 0 or after is before:
        return PassResult(before, 0, near_misses)
    return PassResult(after, matches, near_misses)
