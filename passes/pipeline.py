"""The pipeline as one literal list, edits by name, its text and recipe forms, and order checks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Final

from ..ir.errors import UsageError
from ..ir.nearest import did_you_mean
from ..ir.schemes import ADOPTING, AUTO, is_quantizing
from .adopt_formats import AdoptFormats
from .base import PIPELINE_PHASES, Pass, make_pass
from .catalogue import OUR_PASSES
from .common_subexpressions import CommonSubexpressions
from .eliminate_dead_code import EliminateDeadCode
from .fold_constants import FoldConstants
from .fold_rotary_tables import FoldRotaryTables
from .fuse_add_norm import FuseAddNorm
from .fuse_gated_act import FuseGatedAct
from .fuse_gelu import FuseGelu
from .fuse_layer_norm import FuseLayerNorm
from .fuse_rms_norm import FuseRmsNorm
from .fuse_rope import FuseRope
from .lower_kv import LowerKv
from .merge_linears import MergeGateUp, MergeQkv
from .methods.calibrate_weights import NEAREST, CalibrateWeights
from .methods.channel_scales import NONE as UNSCALED
from .methods.scale_channels import ScaleChannels
from .narrow_activations import NarrowActivations
from .narrow_matrices import NarrowMatrices
from .plan_memory import PLANNED, PlanMemory
from .quantize_weights import QuantizeWeights
from .registry import get_pass
from .remove_no_op import RemoveNoOp
from .share_kv import ShareKv
from .sink_logits_rows import SinkLogitsRows
from .squeeze_unit_batch import SqueezeUnitBatch

STAGES: Final[Mapping[str, tuple[Pass, ...]]] = {
    "canonicalize": (
        EliminateDeadCode(),  # first: captures carry sums over tokens that nothing reads
        SqueezeUnitBatch(),
        RemoveNoOp(),
        CommonSubexpressions(),
        FoldConstants(),
        FoldRotaryTables(),
        RemoveNoOp(),  # again: squeezing and folding leave views of views behind
        CommonSubexpressions(),  # again: views that differed may now be equal
        ShareKv(),  # its layers are the recipe's; none by default
    ),
    "shard": (),
    "quantize": (
        AdoptFormats(),  # before what would round the matrices that it keeps
        NarrowMatrices(),  # before quantisers, which then read 16 bits instead of 32
        ScaleChannels(),  # of what the next one rounds; its method is the recipe's
        QuantizeWeights(),  # its scheme is the recipe's; none by default
        CalibrateWeights(),  # of what that has made; its method is the recipe's
    ),
    "fuse": (
        FuseLayerNorm(),  # before the norm that takes no mean, and is a part of it
        FuseRmsNorm(),
        FuseRope(),
        FuseGelu(),  # before gated activations, which know gelu by name
        MergeQkv(),
        MergeGateUp(),
        FuseGatedAct(),
        FuseAddNorm(),
        RemoveNoOp(),  # again: the transposes that fuse-rope brought cancel those of the model
        SinkLogitsRows(),
        NarrowActivations(),  # behind all that fuses: it looks at who reads what
    ),
    "lower-kv": (LowerKv(),),
    "plan": (),  # a backend's own: see `Backend.plan_passes`
}
"""What `infc compile` runs, in this order; phases without a pass are named so that one may come."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Passes in order; every edit gives another pipeline, and names passes, never indices."""

    passes: tuple[Pass, ...]

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def names(self) -> list[str]:
        """The passes' names, in order."""
        return [one.name for one in self.passes]

    def spell(self) -> str:
        """The pipeline as text that `parse_pipeline` reads back."""
        return ",".join(one.spell() for one in self.passes)

    def after(self, name: str, added: Pass) -> Pipeline:
        """With `added` right behind the last pass of that name; UsageError where there is none."""
        index = self._last(name) + 1
        return Pipeline((*self.passes[:index], added, *self.passes[index:]))

    def before(self, name: str, added: Pass) -> Pipeline:
        """With `added` right before the first pass of that name."""
        self._last(name)
        index = self.names().index(name)
        return Pipeline((*self.passes[:index], added, *self.passes[index:]))

    def without(self, *names: str) -> Pipeline:
        """Without the passes of these names."""
        for name in names:
            self._last(name)
        return Pipeline(tuple(one for one in self.passes if one.name not in names))

    def with_options(self, name: str, **options: Any) -> Pipeline:
        """With these options in every pass of that name; the others keep their values."""
        self._last(name)
        return Pipeline(
            tuple(
                make_pass(type(one), one.option_values() | options) if one.name == name else one
                for one in self.passes
            )
        )

    def placed(self, added: Pass) -> Pipeline:
        """With `added` at the end of its own phase, but before what makes a memory plan.

        A phase ends where infc's own passes of later phases begin, so that passes which stand
        again in a later phase, or that somebody has put somewhere else, do not move its end.
        """
        rank = PIPELINE_PHASES.index(added.phase)

        def is_later(one: Pass) -> bool:
            return PIPELINE_PHASES.index(one.phase) > rank or PLANNED in one.ensures

        ours = [i for i, one in enumerate(self.passes) if type(one) in OUR_PASSES and is_later(one)]
        index = ours[0] if ours else len(self.passes)
        while index and is_later(self.passes[index - 1]):
            index -= 1
        return Pipeline((*self.passes[:index], added, *self.passes[index:]))

    def check(self, facts: frozenset[str] = frozenset()) -> None:
        """UsageError unless every pass finds what it requires, given the facts at the start.

        Also where a pass stands behind the memory plan: values that it lets live longer would
        share their bytes with others; and where two passes share a name.
        """
        kinds = {one.name: type(one) for one in self.passes}
        for one in self.passes:
            if kinds[one.name] is not type(one):
                raise UsageError(f"two passes are named {one.name}", where="pipeline")
        known = set(facts)
        for i, one in enumerate(self.passes):
            for missing in sorted(one.requires - known):
                makers = [kind.name for kind in OUR_PASSES if missing in kind.ensures]
                later = [other.name for other in self.passes[i + 1 :] if missing in other.ensures]
                hint = f"add {makers[0]} before it" if makers else None
                if later:
                    hint = f"{later[0]} ensures it, but comes later"
                raise UsageError(f"pass {one.name} requires {missing}", where="pipeline", hint=hint)
            known |= one.ensures
        if self.passes and PLANNED in known and PLANNED not in self.passes[-1].ensures:
            planners = [one.name for one in self.passes if PLANNED in one.ensures]
            planner = planners[0] if planners else PlanMemory.name  # it had run before
            raise UsageError(
                f"pass {self.passes[-1].name} comes after {planner}, which must be last",
                where="pipeline",
                hint=f"put it before {planner}",
            )

    def _last(self, name: str) -> int:
        names = self.names()
        if name not in names:
            hint = did_you_mean(name, names, "infc passes lists them")
            raise UsageError(f"the pipeline has no pass {name}", hint=hint)
        return len(names) - 1 - names[::-1].index(name)


def default_pipeline(plan: Iterable[Pass] = ()) -> Pipeline:
    """What `infc compile` runs where the recipe says nothing.

    `plan` are the passes that the backend wants at the end.
    """
    return Pipeline((*(one for stage in STAGES.values() for one in stage), *plan))


_ITEM = re.compile(r"\s*([A-Za-z_][\w.:-]*)\s*(?:\{([^{}]*)\})?\s*(,|$)")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def parse_pipeline(text: str) -> Pipeline:
    """The pipeline that a text spells: `a,b{option=value,other=value},my_module:MyPass`.

    UsageError for text that is none, and for unknown passes and options.
    """
    passes: list[Pass] = []
    at = 0
    while at < len(text) or (passes and text.rstrip().endswith(",")):
        match = _ITEM.match(text, at)
        if match is None or at == len(text):
            raise UsageError(
                f"cannot read {text[at:] or 'a pass'} at character {at + 1}",
                where="pipeline",
                hint='write "pass,pass{option=value}"',
            )
        passes.append(make_pass(get_pass(match[1]), _parse_options(match[2] or "")))
        at = match.end()
    return Pipeline(tuple(passes))


def _parse_options(text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or name.strip() in options:
            raise UsageError(f"cannot read the option {part}", where="pipeline")
        options[name.strip()] = _parse_value(value.strip())
    return options


def _parse_value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text in words:
        return words[text]
    if _NUMBER.fullmatch(text):
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    return text.strip('"')


PassSpec = Mapping[str, Any] | Sequence[Any] | str | None


Place = Callable[[tuple[str | int, ...]], str | None]
"""Where an edit was written, by its path in the spec: indices of lists, keys of mappings."""


def build_pipeline(
    spec: PassSpec = None,
    place: Place = lambda _: None,
    plan: Iterable[Pass] = (),
    backend: str | None = None,
) -> Pipeline:
    """The default pipeline, edited as a recipe's `passes` says, and checked.

    `spec` is pipeline text (the whole pipeline), or a mapping: a pass's name to `false` (off),
    `true` or a mapping of options; an unknown name of the form `module:Name` is added at the end
    of its phase, or where its mapping says `after` or `before`. A list of such mappings, or of
    names, edits one after the other. `plan` are the passes that `backend` wants at the end of the
    default pipeline; switching off or configuring one of ours that it does not want has no effect,
    so that a recipe can be compiled for another backend. UsageError names what cannot be done, and
    where `place` says that it stands.
    """
    with _placed(place, ()):
        if isinstance(spec, str):
            pipeline = parse_pipeline(spec)
            pipeline.check()
            return pipeline
    pipeline = default_pipeline(plan)
    reason = f"the backend {backend or 'of this pipeline'} does not use it"
    unused = {kind.name: reason for kind in OUR_PASSES if kind.name not in pipeline.names()}
    items: Sequence[Any] = [spec] if isinstance(spec, Mapping) else spec or []
    for index, item in enumerate(items):
        path = () if isinstance(spec, Mapping) else (index,)
        edits = {item: True} if isinstance(item, str) else item
        if not isinstance(edits, Mapping):
            what = f"passes: expected a name or a mapping, not {item!r}"
            raise UsageError(what, where=place(path))
        for name, value in edits.items():
            with _placed(place, (*path, str(name))):
                pipeline = _edited(pipeline, str(name), value, unused)
    with _placed(place, ()):
        pipeline.check()
    return pipeline


@contextmanager
def _placed(place: Place, path: tuple[str | int, ...]) -> Iterator[None]:
    """Lets a UsageError say where the edit was written, if that is known."""
    try:
        yield
    except UsageError as error:
        where = place(path) or error.where
        raise UsageError(error.message, where=where, hint=error.hint) from error


def _edited(pipeline: Pipeline, name: str, value: Any, unused: Mapping[str, str]) -> Pipeline:
    """`unused` says of passes of ours why the pipeline begins without them."""
    if not isinstance(value, (bool, Mapping, type(None))):
        raise UsageError(f"passes: {name} is {value!r}, expected false, true or options")
    is_unused = name in unused and name not in pipeline.names()
    if value is False:
        return pipeline if is_unused else pipeline.without(name)
    options = dict(value) if isinstance(value, Mapping) else {}
    place = {key: options.pop(key) for key in ("after", "before") if key in options}
    known = {option.name for option in fields(get_pass(name))}
    for key in options.keys() - known:
        if hint := did_you_mean(key, ("after", "before")):
            raise UsageError(f"pass {name} has no option {key}", hint=hint)
    if name in pipeline.names() and not place:
        return pipeline.with_options(name, **options)
    added = make_pass(get_pass(name), options)
    if is_unused and not place:
        return pipeline
    if len(place) > 1:
        raise UsageError(f"passes: {name} has both after and before")
    for neighbour in map(str, place.values()):
        if neighbour in unused and neighbour not in pipeline.names():
            message = f"the pipeline has no pass {neighbour}: {unused[neighbour]}"
            raise UsageError(message, hint=f"place {name} beside another pass")
    if "after" in place:
        return pipeline.after(str(place["after"]), added)
    if "before" in place:
        return pipeline.before(str(place["before"]), added)
    return pipeline.placed(added)


def with_kv_options(pipeline: Pipeline, *, dtype: str, block_size: int) -> Pipeline:
    """The pipeline with the recipe's `kv_cache` settings in its lower-kv pass, where it has one."""
    if LowerKv.name not in pipeline.names():
        return pipeline
    return pipeline.with_options(LowerKv.name, dtype=dtype, block_size=block_size)


def with_quantization(
    pipeline: Pipeline,
    *,
    scheme: str,
    rules: Sequence[tuple[str, str]] = (),
    skip: Sequence[str] = (),
    head: str = "",
    auto_head: str = "",
    attention: str = "",
    embedding: str = "auto",
    method: str = AUTO,
    channel_scaling: str = "none",
) -> Pipeline:
    """The pipeline with the recipe's `quantization` in its pass; unchanged if no scheme is given.

    `rules` are patterns of names with their schemes; `head`, `attention` and `embedding` are the
    schemes of the output head, of the matrices around attention and of the table of tokens, and
    `auto_head` that of a head that is `auto` beside 4 bits.
    UsageError where the recipe has switched that pass off, and for `skip`, a `method` or a
    `channel_scaling` where nothing is quantized.
    """
    schemes = {scheme, head, attention, embedding, *(name for _, name in rules)}
    if not is_quantizing(*schemes):
        for name, given in (
            ("skip", bool(skip)),
            ("method", method != AUTO),
            ("channel_scaling", channel_scaling != UNSCALED),
        ):
            if given:
                raise UsageError(
                    f"{name} has no effect, because nothing is quantized",
                    where="quantization",
                    hint=f"choose a scheme, or leave {name} out",
                )
        return pipeline
    options = {
        "scheme": scheme,
        "rules": " ".join(f"{pattern}={name}" for pattern, name in rules),
        "skip": " ".join(skip),
        "head": head,
        "auto_head": auto_head,
        "attention": attention,
        "embedding": embedding,
    }
    pipeline = pipeline.with_options(QuantizeWeights.name, **options)
    if ADOPTING.keys() & schemes:
        pipeline = pipeline.with_options(AdoptFormats.name, **options)
    pipeline = _with_method(pipeline, ScaleChannels, channel_scaling, UNSCALED, options)
    return _with_method(pipeline, CalibrateWeights, method, NEAREST, {})


def _with_method(
    pipeline: Pipeline,
    kind: type[ScaleChannels | CalibrateWeights],
    method: str,
    default: str,
    options: dict[str, str],
) -> Pipeline:
    """The pipeline with a method, and options, in its passes of a kind.

    `auto` leaves it to a recipe to switch the pass off, or to choose the method among its options.
    UsageError where there is no such pass for another method.
    """
    if method not in (AUTO, default):
        return pipeline.with_options(kind.name, method=method, **options)

    def chosen(one: Pass) -> Pass:
        if not isinstance(one, kind):
            return one
        choice = {"method": method} if one.method == default else {}
        return make_pass(type(one), one.option_values() | options | choice)

    return Pipeline(tuple(map(chosen, pipeline.passes)))
