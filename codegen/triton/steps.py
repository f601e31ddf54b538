"""A program's launches: its nodes in one form of steps, and what stands around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

from ...ir.launches import Extent, Form, Pointer
from ...ir.plan import loop_groups
from ...ir.program import HIDDEN, LOGITS, Node, Program, Value, further_outputs
from ...ir.resources import KvGroup
from ...ir.targets import Target
from ...ir.types import Dim
from .buffers import Buffer, product
from .calls import Passed, Tuning, Typed, extent
from .emitter import FEW_TOKENS, Emitter, FormSpec, power_of_two, step_array
from .fusions import MOST_TOGETHER, lower_together
from .loops import LOOP_OPS, lower_group
from .lower import LOWERINGS
from .lower.attention import query_tile
from .lower.norms import row_tuning
from .options import TritonOptions

SOME_TOKENS = 64
"""Steps of at most so many tokens, or `FEW_TOKENS`, have forms of their own: other tiles of
products suit them."""
_WORDS_OF_COPY = 4096
_PART_OF_ROW = 4096
_BINS = 2048
_WORDS_OF_STATE = 8
"""As in `kernels/draws.py`."""
_DIGITS = ((21, 11), (10, 11), (0, 10))
"""Of an unsigned number of 32 bits: where each begins, and its bits, of at most `_BINS` values."""


def form_specs(program: Program, target: Target, options: TritonOptions) -> Iterator[FormSpec]:
    """The forms of a program, in the order in which an executor looks for one that fits.

    Within a form, the bits of a row depend on nothing but its sequence. Different forms add up the
    same products and attention in other orders, so a batch-invariant program has only one.
    """
    most = program.symbols["T"].high
    if options.batch_invariant:
        yield FormSpec(f"any-{most}", False, most, _query_tile(program, target))
        return
    sequences = min(most, program.symbols["R"].high if "R" in program.symbols else most)
    for bound in sorted({min(FEW_TOKENS, sequences), sequences}):
        yield FormSpec(f"decode-{bound}", True, bound)
    tile = _query_tile(program, target)
    for bound in sorted({min(SOME_TOKENS, most), most}):
        yield FormSpec(f"mixed-{bound}", False, bound, tile)


def _query_tile(program: Program, target: Target) -> int:
    e = Emitter(program, target, FormSpec("mixed", False, 1))
    nodes = [node for node in program.nodes if node.op == "paged_attention"]
    return min((query_tile(e, node, e.cache(node)[0]) for node in nodes), default=1)


def emit_form(e: Emitter) -> Form:
    """All launches of a step of one form."""
    program = e.program
    _copies(e)
    _carried(e)
    hidden, further = program.output(HIDDEN), further_outputs(program)
    runs = list(_runs(program))
    at = 0
    while at < len(runs):
        at += _lower(e, runs[at : at + MOST_TOGETHER])
        e.nodes = ()
        if hidden is not None and hidden.name in e.buffers:
            # At once, not at the end: a step that wants nothing of the head is done here.
            _widen(e, hidden, HIDDEN)
            e.when = "always" if further else "head"
            hidden = None
    if (logits := program.output(LOGITS)) is not None:
        _logits(e, e.dense(e.buffer(logits)))
    e.when = "always"
    for name, value in further.items():
        _widen(e, value, name)
    _clear_counters(e)
    return Form(
        e.form.name, e.form.one_query, e.form.max_tokens, tuple(e.launches), e.form.query_tile
    )


def _clear_counters(e: Emitter) -> None:
    """In each step and before all else: a step that failed may have left anything in memory."""
    rest = e.launches[:]
    e.launches.clear()
    for offset, count in e.counters.items():
        block = min(1024, power_of_two(count))
        e.launch(
            "rows.fill",
            [extent(count, divisor=block)],
            {"out": Typed(Pointer("arena", "", offset), "i32"), "count": count, "value": 0.0},
            {"BLOCK": block},
        )
    e.launches.extend(rest)


def _lower(e: Emitter, runs: Sequence[tuple[Node, ...]]) -> int:
    """Lower the first of these runs, and as many behind it as belong to its launches."""
    single = [nodes[0] for nodes in takewhile(lambda nodes: len(nodes) == 1, runs)]
    if single and (count := lower_together(e, single)):
        return count
    e.nodes = runs[0]
    if runs[0][0].op in LOOP_OPS:
        lower_group(e, runs[0])
    else:
        LOWERINGS[runs[0][0].op](e, runs[0][0])
    return 1


def _runs(program: Program) -> Iterator[tuple[Node, ...]]:
    """Nodes one by one in order, groups of loops whole where their last member stands."""
    by_output = {node.outputs[0].name: node for node in program.nodes if node.outputs}
    group_of: dict[str, tuple[Node, ...]] = {}
    for names in loop_groups(program):
        nodes = tuple(by_output[name] for name in names)
        group_of.update({node.outputs[0].name: nodes for node in nodes})
    for node in program.nodes:
        group = group_of.get(node.outputs[0].name, (node,)) if node.outputs else (node,)
        if node is group[-1]:
            yield group


def _copies(e: Emitter) -> None:
    """Blocks that are copied before anything is written."""
    e.when = "copies"
    for group in e.program.resources:
        if isinstance(group, KvGroup):
            words = group.bytes_per_block() // 4
            e.launch(
                "step.copy_blocks",
                [Extent(1, "C"), extent(words, divisor=_WORDS_OF_COPY)],
                {
                    "pages": Typed(Pointer("state", group.name), "i32"),
                    "pairs": step_array(f"block_copies:{group.name}"),
                },
                {"PAGE": words, "BLOCK": _WORDS_OF_COPY},
                Tuning(8),
            )
    e.when = "always"


def _carried(e: Emitter) -> None:
    """Tokens that only the step before knows."""
    if any(value.name == "input_ids" for value in e.program.inputs):
        e.launch(
            "step.resolve_carried",
            [Extent(1, "P", divisor=128)],
            {
                "token_ids": step_array("token_ids"),
                "carried": step_array("carried"),
                "tokens_before": step_array("tokens_before"),
                "count": Extent(1, "P"),
            },
            {"BLOCK": 128},
        )


def _widen(e: Emitter, value: Value, name: str) -> None:
    """Rows leave as the host takes them: float32, or int32."""
    when = e.when
    e.when = "hidden" if name == HIDDEN else when
    buffer = e.dense(e.buffer(value))
    rows = e.rows(buffer) if buffer.shape else None
    width = 1 if rows is None else rows.length
    block = min(1024, power_of_two(width))
    kind = "fp32" if value.type.dtype.is_float else "i32"
    e.launch(
        "rows.widen_rows",
        [product(buffer.shape[:-1]), extent(width, divisor=block)],
        {"x": buffer, "out": Typed(Pointer("output", name), kind)},
        {"STRIDE": width, "WIDTH": width, "BLOCK": block},
        row_tuning(block),
    )
    e.when = when


def _logits(e: Emitter, logits: Buffer) -> None:
    """The tokens that are drawn, and as float32 those rows that are wanted."""
    width = logits.shape[-1]
    assert isinstance(width, int), "logits have a fixed width"
    most = e.bounds.get("R", e.bounds["T"])
    changed = Typed(e.scratch("changed", most * width * 4), "fp32")
    e.when = "adjusted"
    _adjust(e, logits, changed, width)
    _draws(e, logits, changed, width)
    e.when = "logits"
    block = min(1024, power_of_two(width))
    e.launch(
        "rows.pick_rows",
        [Extent(1, "L"), extent(width, divisor=block)],
        {
            **{"x": logits, "index": step_array("logits_rows")},
            "out": Typed(Pointer("output", LOGITS), "fp32"),
        },
        {"STRIDE": width, "WIDTH": width, "BLOCK": block},
        row_tuning(block),
    )


def _draws(e: Emitter, logits: Buffer, changed: Typed, width: int) -> None:
    """The tokens that are drawn: the greatest in two launches, others in seven more."""
    most = e.bounds.get("R", e.bounds["T"])
    parts = -(-width // _PART_OF_ROW)
    block = min(_PART_OF_ROW, power_of_two(width))
    tokens = Typed(Pointer("output", "tokens"), "i32")
    tops = Typed(e.scratch("draws.tops", most * parts * 4), "fp32")
    places = Typed(e.scratch("draws.places", most * parts * 4), "i32")
    now, after = (
        Typed(e.scratch(name, most * _WORDS_OF_STATE * 8), "i64")
        for name in ("draws.states", "draws.states_after")
    )
    bins = Typed(e.scratch("draws.bins", most * _BINS * 8), "i64")
    arrived = Typed(e.scratch("draws.arrived", most * 4), "i32")
    rows: dict[str, Passed | Buffer] = {
        **{"logits": logits, "draws": step_array("draws", "i64")},
        **{"adjusted": step_array("adjusted"), "num_adjusted": Extent(1, "A"), "changed": changed},
    }
    cut = {"V": width, "PARTS": parts, "BLOCK": block, "MOST_ADJUSTED": power_of_two(most)}
    by_part: list[Dim | Extent] = [Extent(1, "D"), parts]
    e.when = "draws"
    e.launch("sampling.row_tops", by_part, {**rows, "tops": tops, "places": places}, cut)
    e.launch(
        "draws.draw_tokens",
        [Extent(1, "D")],
        {
            **{"draws": rows["draws"], "tops": tops, "places": places, "tokens": tokens},
            **{"states": now, "bins": bins, "arrived": arrived},
        },
        {"V": width, "PARTS": parts, "PARTS_BLOCK": power_of_two(parts)},
    )
    e.when = "sampled"
    # All weights of a row are at most one: their sum fits into 63 bits.
    one = 2.0 ** (62 - (width - 1).bit_length())
    for share in (False, True):
        for shift, bits in _DIGITS:
            digit = {"SHARE": share, "ONE": one, "SHIFT": shift, "WIDTH": bits}
            state = {"states": now, "states_after": after, "bins": bins, "arrived": arrived}
            e.launch("draws.narrow_cuts", by_part, {**rows, **state}, {**cut, **digit})
            now, after = after, now
    passed: dict[str, Passed | Buffer] = {
        **rows,
        **{"states": now, "arrived": arrived},
        "masses": Typed(e.scratch("draws.masses", most * parts * 8), "fp64"),
        "equals": Typed(e.scratch("draws.equals", most * parts * 4), "i32"),
        "tokens": tokens,
    }
    constants = {**cut, "PARTS_BLOCK": power_of_two(parts)}
    e.launch("draws.sample_tokens", by_part, passed, constants)


def _adjust(e: Emitter, logits: Buffer, changed: Typed, width: int) -> None:
    """Copies of the rows of adjusted draws, with bias, penalties and masks."""
    draws, adjusted = step_array("draws", "i64"), step_array("adjusted")
    e.launch(
        "sampling.adjust_rows",
        [Extent(1, "A"), extent(width, divisor=1024)],
        {
            **{"logits": logits, "draws": draws, "adjusted": adjusted},
            **{"masks": step_array("masks"), "out": changed},
        },
        {"V": width, "WORDS": -(-width // 32), "BLOCK": 1024},
    )
    e.launch(
        "sampling.adjust_entries",
        [Extent(1, "A")],
        {
            **{"draws": draws, "adjusted": adjusted, "bias_ids": step_array("bias_ids")},
            **{"bias": step_array("bias", "fp32"), "count_ids": step_array("count_ids")},
            **{"counts": step_array("counts"), "token_ids": step_array("token_ids")},
            **{"logits_index": step_array("logits_index"), "carried": step_array("carried")},
            **{"num_carried": Extent(1, "P"), "out": changed},
        },
        {"V": width, "BLOCK": 256},
    )
