"""Multiplies the columns of matrices that will be quantised, and divides what they multiply."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar

from ...ir.builder import ProgramBuilder, remove_dead_code
from ...ir.errors import PassError, UsageError
from ...ir.interpret import describe
from ...ir.machine import available_cpus
from ...ir.program import Attr, Program, WeightExpr
from ...ir.schemes import ADOPTING, AUTO, SCHEMES, Scheme
from ...ir.text import print_expr
from ...ir.torch_threads import one_torch_thread
from ...ir.types import DType
from ...ir.weights import compute_expr, evaluate_weight, is_read_alike
from ..base import PassContext, PassResult, finish
from ..constants import computed_weight
from ..near_miss import NearMiss
from ..scheme_choices import SchemeChoices, SchemePass
from .calibration import Calibration, ScaledGroup, figure
from .channel_groups import ChannelGroup, Divided, find_groups
from .channel_scales import (
    AWQ,
    NONE,
    SCALINGS,
    SMOOTHQUANT,
    SMOOTHQUANT_EXPONENT,
    Choice,
    Matrices,
    Windows,
    choose_scales,
    sampled,
    scale_logs,
)
from .correction import HELD_OUT
from .layer_runs import STEP_INPUTS, LayerRuns

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScaleChannels(SchemePass):
    """`linear(mul(@n, %x), @w)` => the same with `@n = mul(n, calibrated{..})` and
    `@w = mul(w, calibrated{..})`: divided by scales, and multiplied by them.

    `method` is smoothquant, awq, none, or auto, which is awq if there is a calibration text.
    `exponent` (0 to 1) is the share of activations in the scales of smoothquant; the other options
    are those of quantize-weights. All that reads the rows takes part, routers of experts too; rows
    that something else reads stay.

    Requires: unit-batch-squeezed. Ensures: nothing more (by default the method is none).
    Keeps: exact: scales are powers of two.
    Why: a channel with large activations takes the precision of all others, and rounding the
    weights that it meets costs most.
    """

    method: str = NONE
    exponent: float = SMOOTHQUANT_EXPONENT

    name: ClassVar[str] = "scale-channels"
    phase: ClassVar[str] = "quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})

    @property
    def reads_text(self) -> bool:
        """Whether scales are chosen."""
        return self.method != NONE and self.is_used

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Scale every group of products where that lowers the error of what is quantised."""
        if self.method not in SCALINGS:
            known = ", ".join(SCALINGS)
            raise UsageError(f"unknown method {self.method}", where=self.name, hint=known)
        if not 0 <= self.exponent <= 1:
            raise UsageError(f"exponent is {self.exponent}, expected 0 to 1", where=self.name)
        if self.exponent != SMOOTHQUANT_EXPONENT and self.method != SMOOTHQUANT:
            raise UsageError(
                f"exponent has no effect with method {self.method}",
                where=self.name,
                hint="choose smoothquant (quantization.channel_scaling), or leave exponent out",
            )
        if not self.reads_text:
            return finish(program, program, 0)
        calibration = context.calibration
        if calibration is None and self.method == AUTO:
            return finish(program, program, 0)
        choices = SchemeChoices(program, self, lambda _, name, __: _scheme(name))
        schemes = {id(node): choices.choose(node) for node in program.nodes}
        chosen = {key: one for key, one in schemes.items() if isinstance(one, Scheme)}
        if context.patterns is None:  # told by quantize-weights as well, but after minutes
            choices.require_all_used()
        groups, misses = find_groups(program, chosen, choices.heads)
        if not groups:
            return finish(program, program, 0, tuple(misses))
        if calibration is None:
            raise UsageError(
                f"method {self.method} needs a calibration text",
                where=self.name,
                hint="set quantization.calibration in the recipe",
            )
        method = AWQ if self.method == AUTO else self.method
        search = _Search(program, groups, calibration, method, self.exponent)
        # The same passes run again over a few layers of the model: those have their scales already.
        if not calibration.channels and not calibration.is_added:
            search.run()
        used = [group for group in groups if _is_scaled(program, group, calibration)]
        after = _scaled(program, used, calibration) if used else program
        result = finish(program, after, len(used), (*misses, *search.misses))
        return replace(result, details=search.details())


def _scheme(name: str) -> Scheme | str:
    """Of what the file holds in few bits and could not be adopted, nothing is scaled."""
    return "it is adopted" if name in ADOPTING else SCHEMES[name]


@dataclass(slots=True)
class _Search:
    """Chooses the scales of groups, on what the model computes before anything is quantised."""

    program: Program
    groups: Sequence[ChannelGroup]
    calibration: Calibration
    method: str
    exponent: float
    records: list[dict[str, Any]] = field(default_factory=list, init=False)
    misses: list[NearMiss] = field(default_factory=list, init=False)

    def run(self) -> None:
        """PassError for a program that is no model's step, and for inputs that are not finite."""
        windows = self.calibration.windows
        if not windows or not {v.name for v in self.program.inputs} <= STEP_INPUTS:
            what = "no calibration tokens" if not windows else "the program is not a model's step"
            raise PassError(what)
        work = [self._work(group) for group in self.groups]
        places = {id(node): index for index, node in enumerate(self.program.nodes)}
        with one_torch_thread(), ThreadPoolExecutor(available_cpus()) as pool:
            runs = LayerRuns(self.program, windows, self._weight, pool)
            for index, group in enumerate(self.groups):
                self._tell(group, sum(work[:index]), sum(work))
                runs.run_to(places[id(group.readers[0])])
                self._keep(group, self._choose(group, runs.get(group.rows), pool))
        self._tell(self.groups[-1], sum(work), sum(work))

    def details(self) -> dict[str, Any]:
        """For the report: the text, and the error of each group, with and without scales."""
        if not self.records:
            return {}
        text = {"tokens": self.calibration.tokens, **self.calibration.description}
        return {"calibration": text, "errors": self.records}

    def _weight(self, name: str) -> torch.Tensor:
        pairs = self.calibration.pairs
        return evaluate_weight(self.program, name, check_finite=False, pairs=pairs)

    def _choose(
        self, group: ChannelGroup, rows: Sequence[torch.Tensor], pool: ThreadPoolExecutor
    ) -> Choice:
        import torch

        if not all(bool(torch.isfinite(one.sum(dtype=torch.float64))) for one in rows):
            where = describe(group.readers[0])
            raise PassError("the inputs of a product hold NaN or infinity", where=where)
        quantized = {name: one for name, one in group.matrices.items() if one is not None}
        largest = torch.zeros(group.depth)
        samples = []
        for name in quantized:
            matrix = self._weight(name)
            samples.append(sampled(matrix, len(quantized)))
            columns = matrix.reshape(-1, group.depth).abs().amax(0)
            largest = torch.maximum(largest, columns.float())
        matrices = Matrices(samples, list(quantized.values()), self.calibration.pairs.quantizers)
        held = rows[HELD_OUT - 1 :: HELD_OUT]
        fitted = [one for i, one in enumerate(rows) if i % HELD_OUT != HELD_OUT - 1]
        rows_of = Windows(fitted, held or fitted)
        logs = scale_logs(self.method, self.exponent, rows_of.fitted, largest)
        return choose_scales(logs, matrices, group.classes, rows_of, pool)

    def _keep(self, group: ChannelGroup, choice: Choice) -> None:
        """Writes the scales, and what divides by them, for `_scaled`."""
        import torch

        self.records.append(
            {
                "matrices": list(group.matrices),
                "exponent": choice.exponent,
                "error": figure(choice.plain_error),
                "scaled": figure(choice.scaled_error),
                "used": choice.scales is not None,
            }
        )
        content = _content(self.program, group)
        self.calibration.channels[group.name] = ScaledGroup(
            choice.scales is not None, content, self.program.loaders
        )
        if choice.scales is None:
            reason = "not scaled, which would not lower the error on windows that were left out"
            self.misses.append(NearMiss.at(group.readers[0], reason))
            return
        self.calibration.spill.write(_columns_key(group), choice.scales)
        for one in group.divided:
            (size, *others) = _divided_shape(self.program, one)
            inverse = torch.ones(size).index_put_((one.places,), 1 / choice.scales)
            self.calibration.spill.write(_divided_key(group, one), inverse.reshape(size, *others))

    def _work(self, group: ChannelGroup) -> int:
        """A measure of the time that a group takes: how many weights are before its end."""
        kinds = [self.program.weights[name].type for name in group.matrices]
        return sum(kind.num_elements() for kind in kinds)

    def _tell(self, group: ChannelGroup, done: int, total: int) -> None:
        layer = group.readers[0].layer
        where = "products" if layer is None else f"layer {layer}"
        detail = f"scaling channels of {where} on {self.calibration.tokens} tokens"
        self.calibration.advance(done, total, detail)


def _is_scaled(program: Program, group: ChannelGroup, calibration: Calibration) -> bool:
    """Whether scales were found for a group: of the same weights, in a program that was added."""
    found = calibration.channels.get(group.name)
    if found is None or not found.is_scaled or not calibration.is_added:
        return found is not None and found.is_scaled
    exprs = [program.weights[name].expr for name in _weights(group)]
    alike = all(is_read_alike(expr, program.loaders, found.loaders) for expr in exprs)
    return alike and found.content == _content(program, group)


def _weights(group: ChannelGroup) -> list[str]:
    return [*group.matrices, *(one.weight for one in group.divided)]


def _content(program: Program, group: ChannelGroup) -> str:
    """What a group multiplies and divides, and where."""
    weights = {name: print_expr(program.weights[name].expr) for name in _weights(group)}
    places = [sha256(one.places.numpy().tobytes()).hexdigest() for one in group.divided]
    return f"{weights} {places}"


def _scaled(program: Program, groups: Sequence[ChannelGroup], calibration: Calibration) -> Program:
    """The program with the columns of matrices multiplied by scales, and their inputs divided.

    Values that are divided get names of their own: they are not what they were.
    """
    builder = ProgramBuilder.from_program(program)
    builder.loaders["calibrated"] = calibration.spill.read
    path = {id(node) for group in groups for node in group.path}
    computed: dict[int, list[tuple[str, Divided]]] = {}
    for group in groups:
        for name in group.matrices:
            _multiply(builder, name, _columns_key(group), (group.depth,))
        for one in group.divided:
            key = _divided_key(group, one)
            if one.made_by is not None:
                computed.setdefault(id(one.made_by), []).append((key, one))
            else:
                _multiply(builder, one.weight, key, _divided_shape(program, one))
    for node in program.nodes:
        if id(node) in computed:
            ref = computed_weight(builder, node.op, node.inputs, node.attrs)
            assert ref is not None
            for key, one in computed[id(node)]:
                _multiply(builder, ref.name, key, _divided_shape(program, one))
            builder.replace(node.output, ref)
        elif id(node) in path:
            names = [f"{value.name}.scaled" for value in node.outputs]
            made = builder.add(
                node.op, node.inputs, node.attrs, names=names, layer=node.layer, source=node.source
            )
            builder.replace(node.output, made.output)
        else:
            builder.copy(node)
    return remove_dead_code(builder.build())


def _multiply(builder: ProgramBuilder, name: str, key: str, shape: tuple[int, ...]) -> None:
    """Multiplies an entry of the weight table by a tensor that was kept under that key."""
    entry = builder.weights[name]
    attrs: dict[str, Attr] = {"key": key, "dtype": DType.F32.value, "shape": shape}
    factor = WeightExpr("calibrated", (), attrs)
    if entry.type.dtype is not DType.F32:  # which holds every power of two that is used
        factor = WeightExpr("cast", (factor,), {"dtype": entry.type.dtype.value})
    builder.weights[name] = replace(entry, expr=compute_expr("mul", (entry.expr, factor), {}))


def _columns_key(group: ChannelGroup) -> str:
    return f"{group.name}.columns"


def _divided_key(group: ChannelGroup, one: Divided) -> str:
    """Of the group too: others may divide other elements of the same weight."""
    return f"{group.name}.{one.weight}.divided"


def _divided_shape(program: Program, one: Divided) -> tuple[int, ...]:
    """The shape of what a weight is multiplied by: a vector, or a column of a number per row."""
    weight = program.weights[one.weight]
    shape = (weight if one.made_by is None else one.made_by.output).type.shape
    assert isinstance(shape[0], int)
    return (shape[0], 1) if len(shape) > 1 else (shape[0],)
