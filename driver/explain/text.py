"""Facts of an artifact as tables for a terminal."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypedDict

from ...ir.sizes import format_count, format_size
from .amounts import (
    format_bytes,
    format_change,
    format_intensity,
    format_operations,
    format_seconds,
    format_share,
    moved_bytes,
    printable,
)
from .certificate_text import certificate_pairs
from .facts import (
    ArtifactFacts,
    Costs,
    KvGroupFacts,
    LayerFacts,
    NearMissFacts,
    PassFacts,
    Predictions,
    ProgramFacts,
    ShapeFacts,
    StoredFacts,
)
from .launches_text import FORM_HEAD, form_rows, kernel_pairs

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 140
"""Columns where nobody says how many a terminal has: a file, a pipe."""
_MOST_NEAR_MISSES = 20

Rows = Iterable[Sequence[str]]


def render_artifact(facts: ArtifactFacts, *, width: int = WIDTH, color: bool = False) -> str:
    """The whole report: model, memory, layers, ops, passes, near misses, files, recipe."""
    page = Page(width, color)
    page.pairs("", _summary(facts))
    page.pairs("memory", _memory(facts))
    if facts.program is not None:
        page.say(costs_note(facts))
        page.table("layers", LAYER_HEAD, [*_layer_rows(facts)])
        page.table("ops", OP_HEAD, [*op_rows(facts.program)])
    if facts.predictions is not None:
        where = facts.predictions.where
        page.say(f"at {where}: {facts.predictions.ceilings.describe()}")
        page.table("roofline", _ROOFLINE_HEAD, [*_roofline_rows(facts, facts.predictions)])
    if facts.launches is not None:
        page.table("launches of a step that samples", FORM_HEAD, [*form_rows(facts.launches)])
        page.pairs("kernels", kernel_pairs(facts.launches))
    certificate = facts.certificate
    is_measured = bool(certificate and certificate["passes"])
    say_passes(page, facts.passes, facts.verification, with_losses=not is_measured)
    if certificate is not None:
        page.pairs("certificate", certificate_pairs(certificate))
    page.pairs("files", _files(facts))
    page.pairs("recipe", _flatten(facts.manifest.recipe))
    return page.text()


def render_passes(passes: Sequence[PassFacts], verification: Sequence[str]) -> str:
    """What passes did, and what was verified, as in the whole report."""
    page = Page(WIDTH, color=False)
    say_passes(page, passes, verification)
    return page.text()


def say_passes(
    page: Page,
    passes: Sequence[PassFacts],
    verification: Sequence[str],
    *,
    with_losses: bool = True,
) -> None:
    """What passes did, what they nearly did, and what was verified."""
    if not passes:
        return
    page.table("passes", PASS_HEAD, [*pass_rows(passes)])
    page.lines("", _idle(passes))
    page.lines("why not (near misses)", near_miss_lines(_all_misses(passes)))
    if with_losses:
        page.lines("lost by lossy passes, against the program before each", _losses(passes))
    page.lines("verified", verification)


def _losses(passes: Sequence[PassFacts]) -> Iterator[str]:
    for one in passes:
        far = one.distance
        if one.contract != "lossy" or not one.matches:
            continue
        if far is None:
            yield f"{one.name}: not measured on a whole run"
            continue
        numbers = (
            f"KL {float(far['kl']):.3g}, top-1 {100 * float(far['top1']):.1f} %,"
            f" error {float(far['error']):.3g}"
        )
        yield f"{one.name}: {numbers} ({far['rows']} random tokens, {far['what']})"


class Terminal(TypedDict):
    """Keyword arguments of the renderers."""

    width: int
    color: bool


class Page:
    """Sections of text, one after the other, with titles; nothing in them is markup."""

    def __init__(self, width: int, color: bool) -> None:
        from rich.console import Console

        self.console: Console = Console(
            file=io.StringIO(),
            width=width,
            force_terminal=color,
            color_system="standard" if color else None,
            markup=False,
            highlight=False,
            emoji=False,
        )
        self._begun = False

    def text(self) -> str:
        """All that was written, without blanks at ends of lines."""
        assert isinstance(self.console.file, io.StringIO)
        lines = self.console.file.getvalue().split("\n")
        return "\n".join(line.rstrip() for line in lines)

    def title(self, title: str) -> None:
        """An empty line, and the title."""
        if self._begun:
            self.console.print()
        self._begun = True
        if title:
            self.console.print(title, style="bold")

    def say(self, text: str) -> None:
        """A paragraph of its own."""
        self.title("")
        self.console.print(text, style="italic")

    def lines(self, title: str, lines: Iterable[str]) -> None:
        """Lines below a title; no title where there are none."""
        kept = list(lines)
        if kept:
            self.title(title)
        for line in kept:
            self.console.print("  " + printable(line), soft_wrap=True)

    def pairs(self, title: str, pairs: Iterable[tuple[str, str]]) -> None:
        """Names and what belongs to them."""
        rows = list(pairs)
        indent = 2 if title else 0
        width = max((len(name) for name, _ in rows), default=0)
        if rows:
            self.title(title)
        from rich.text import Text

        for name, value in rows:
            line = Text(" " * indent).append(f"{printable(name):<{width}}  ", style="cyan")
            self.console.print(line.append(printable(value)), soft_wrap=True)

    def table(self, title: str, head: Sequence[str], rows: Rows) -> None:
        """Columns; those whose heading begins with `>` are flush right. The last row may be `=`."""
        from rich.table import Table

        kept = list(rows)
        if not kept:
            return
        self.title(title)
        table = Table(box=None, pad_edge=False, header_style="cyan", padding=(0, 2, 0, 0))
        for name in ("", *head):
            right = name.startswith(">")
            table.add_column(
                name.lstrip(">"), justify="right" if right else "left", overflow="fold"
            )
        for row in kept:
            total = row[0].startswith("=")
            cells = [printable(cell).removeprefix("=") for cell in row]
            table.add_row("", *cells, style="bold" if total else None)
        self.console.print(table)


def terminal() -> Terminal:
    """How wide stdout is, and whether it shows colours."""
    import shutil
    import sys

    if not sys.stdout.isatty():
        return Terminal(width=WIDTH, color=False)
    return Terminal(width=shutil.get_terminal_size().columns, color="NO_COLOR" not in os.environ)


def _summary(facts: ArtifactFacts) -> Iterator[tuple[str, str]]:
    manifest = facts.manifest
    model, limits = manifest.model, manifest.main.limits
    yield "artifact", f"{facts.path} ({facts.identity[:12]})"
    yield "made by", f"infc {manifest.infc_version}"
    if facts.program is None:
        yield "model", f"{model.architecture}, {model.num_parameters / 1e6:,.1f} M parameters"
    else:
        yield from _shape(model.architecture, facts.program.shape)
    yield "weights", "; ".join(_schemes(facts)) or f"{manifest.recipe.get('dtype', '?')}"
    yield "backend", f"{manifest.backend}: {manifest.main.entry.file} ({manifest.main.entry.kind})"
    yield "target", manifest.target.name
    yield "context", f"{limits.max_context} tokens"
    step = f"{limits.step_tokens} tokens of {limits.max_sequences} sequences"
    yield "step", f"{step}, {limits.logit_rows} rows of logits"
    if manifest.tokenizer is None:
        yield "tokenizer", "none: token ids only"
    else:
        chat = "with" if manifest.tokenizer.chat_template else "without"
        yield "tokenizer", f"ends at {list(manifest.tokenizer.eos)}, {chat} a chat template"


def _shape(architecture: str, shape: ShapeFacts) -> Iterator[tuple[str, str]]:
    """What the program is, whatever the checkpoint's configuration was."""
    yield "model", f"{architecture}, {shape.num_parameters / 1e6:,.1f} M parameters"
    kinds: dict[str, int] = {}
    for one in shape.attention:
        heads = f"{one.heads} heads of {one.head_dim} over {one.kv_heads}"
        kinds[heads] = kinds.get(heads, 0) + len(one.layers)
    said = [
        heads if len(kinds) == 1 else f"{format_count(count, 'layer')} with {heads}"
        for heads, count in kinds.items()
    ]
    yield "shape", ", ".join([f"{shape.num_layers} layers of {shape.width}", *said])
    yield "windows", _windows(shape)
    if shape.sharing:
        count = f"{len(shape.sharing)} of {format_count(shape.num_layers, 'layer')}"
        yield "caches", f"{count} read that of an earlier layer, and have none of their own"
    yield "vocabulary", f"{shape.vocabulary}"


def _windows(shape: ShapeFacts) -> str:
    """Layers by their windows, in the order of the first of each."""
    layers = sorted((layer, one.window) for one in shape.attention for layer in one.layers)
    counts = Counter(window for _, window in layers)
    if set(counts) <= {None}:
        return "none: every layer sees the whole context"
    return ", ".join(
        f"{format_count(count, 'layer')} " + ("of full attention" if size is None else f"of {size}")
        for size, count in counts.items()
    )


def _schemes(facts: ArtifactFacts) -> Iterator[str]:
    for one in facts.program.schemes if facts.program else ():
        matrices = format_count(one.matrices, "matrix", "matrices")
        held = one.dtype if one.scheme == "dense" else one.scheme
        bits = f"{one.bits_per_weight:.2f}".rstrip("0").rstrip(".")
        yield f"{matrices} in {held}, {bits} bits a weight"


def _memory(facts: ArtifactFacts) -> Iterator[tuple[str, str]]:
    memory = facts.memory
    yield "weights", format_size(memory.weights_bytes)
    yield "arena", f"{format_size(memory.arena_bytes)}, all that a step needs between its ops"
    limits = facts.manifest.main.limits
    rows = format_count(min(limits.logit_rows, limits.step_tokens), "row")
    hidden = ", hidden states included" if facts.manifest.main.hidden_width else ""
    yield "logits", f"{format_size(memory.logits_bytes)} at most, {rows}{hidden}"
    for group in memory.groups:
        yield f"kv {group.name}", group_text(group)
    yield "kv in all", f"{format_size(memory.kv_token_bytes)} a token"
    batch = f"{memory.largest_batch} of {format_count(memory.context, 'token')} each"
    if memory.largest_batch == memory.max_batch:
        batch += ", all that was compiled in"
    yield "largest batch", f"{batch}, in {format_size(memory.budget)}"
    if memory.largest_batch:
        yield (
            "to serve it",
            " ".join(
                f"--{name} {value}"
                for name, value in (
                    ("kv-memory", f"{-(-memory.batch_kv_bytes // 2**20)}MiB"),
                    ("max-sequences", memory.largest_batch),
                    ("max-context", memory.context),
                )
            ),
        )


def group_text(group: KvGroupFacts | StoredFacts) -> str:
    """What a group takes, and of what it is."""
    token = f"{format_size(group.token_bytes)} a token"
    block = f"{format_size(group.block_bytes)} a block of {group.block_size}"
    layers = format_count(len(group.layers), "layer")
    if isinstance(group, StoredFacts):
        return f"{token}, {block}; {layers}, {group.kind} in {group.dtype}"
    kind = "full attention" if group.window is None else f"window of {group.window}"
    dims = f"{group.num_kv_heads} heads of {group.key_head_dim}"
    if group.value_head_dim != group.key_head_dim:
        dims += f" and {group.value_head_dim}"
    return f"{token}, {block}; {layers}, {kind}, {dims} in {group.dtype}"


def costs_note(facts: ArtifactFacts) -> str:
    """Which two steps the costs are of."""
    load = facts.workload
    decode = f"decode: one token for {format_count(load.batch, 'sequence')}"
    prefill = f"prefill: {format_count(load.tokens, 'token')} of one prompt"
    return f"{decode}; {prefill}; each with {load.context} tokens stored after it"


_COST_HEAD = (
    ">decode bytes", ">share", ">ops", ">ops/byte", ">prefill bytes", ">share", ">ops", ">ops/byte",
)  # fmt: skip
LAYER_HEAD = ("layers", "kv", ">nodes", ">weights", *_COST_HEAD)
OP_HEAD = ("op", ">count", *_COST_HEAD, "made by")


def cost_cells(costs: Costs, total: Costs) -> tuple[str, ...]:
    """The columns of both steps: bytes, their share of the total, operations, intensity."""
    cells: list[str] = []
    for cost, whole in ((costs.decode, total.decode), (costs.prefill, total.prefill)):
        moved = moved_bytes(cost)
        cells += [format_bytes(moved), format_share(moved, moved_bytes(whole))]
        cells += [format_operations(cost.flops) if cost.flops else "-", format_intensity(cost)]
    return tuple(cells)


def _layer_rows(facts: ArtifactFacts) -> Iterator[Sequence[str]]:
    program = facts.program
    assert program is not None
    for layer in program.layers:
        weights = format_bytes(layer.weight_bytes)
        cells = cost_cells(layer.costs, program.total)
        yield (short_title(layer), layer.kv_group or "-", str(layer.nodes), weights, *cells)
    rest = [node for node in program.nodes if node.layer is None]
    held = sum({w.name: w.num_bytes for node in rest for w in node.weights}.values())
    cells = cost_cells(program.outside, program.total)
    yield ("outside", "-", str(len(rest)), format_bytes(held), *cells)


def short_title(layer: LayerFacts) -> str:
    """ "0", "1-30 each", "1, 3 .. 29 each"."""
    text = layer.title.removeprefix("layers ").removeprefix("layer ")
    text, _, equal = text.partition(":")
    return f"{text} (each)" if equal else text


def op_rows(program: ProgramFacts) -> Iterator[Sequence[str]]:
    """The table of ops, under OP_HEAD, with the sum as the last row."""
    for op in program.ops:
        made = ", ".join(
            name if count == op.count else f"{name} ({count})" for name, count in op.made_by.items()
        )
        yield (op.op, str(op.count), *cost_cells(op.costs, program.total), made or "-")
    yield ("=in all", str(len(program.nodes)), *cost_cells(program.total, program.total), "")


_ROOFLINE_HEAD = ("op", ">count", ">decode", ">share", ">prefill", ">share")


def _roofline_rows(facts: ArtifactFacts, all_ops: Predictions) -> Iterator[Sequence[str]]:
    """The least time of each op, of both steps, and the tokens a second that they allow."""
    for op in all_ops.ops:
        decode = (format_seconds(op.decode), format_share(op.decode, all_ops.decode))
        prefill = (format_seconds(op.prefill), format_share(op.prefill, all_ops.prefill))
        yield (op.op, str(op.count), *decode, *prefill)
    yield ("=in all", "", format_seconds(all_ops.decode), "", format_seconds(all_ops.prefill), "")
    rates = (facts.workload.batch / all_ops.decode, facts.workload.tokens / all_ops.prefill)
    yield ("=tokens/s", "", f"{rates[0]:.1f}", "", f"{rates[1]:.1f}", "")


PASS_HEAD = ("pass", ">matches", ">nodes", ">bytes", ">ops", "contract", "verified")


def pass_rows(passes: Sequence[PassFacts]) -> Iterator[Sequence[str]]:
    """The table of passes that matched, under PASS_HEAD."""
    for one in passes:
        if not one.matches:
            continue
        nodes = f"{one.nodes}"
        if one.nodes_before is not None and one.nodes != one.nodes_before:
            nodes = f"{one.nodes - one.nodes_before:+d} = {one.nodes}"
        moved = work = ""
        if one.before is not None:
            moved = format_change(moved_bytes(one.before), moved_bytes(one.after))
            work = format_change(one.before.flops, one.after.flops)
        cells = (str(one.matches), nodes, moved, work, one.contract or "-", one.verified)
        yield (one.name, *cells)


def _idle(passes: Sequence[PassFacts]) -> Iterator[str]:
    idle = list(dict.fromkeys(one.name for one in passes if not one.matches))
    worked = {one.name for one in passes if one.matches}
    names = [name for name in idle if name not in worked]
    if names:
        yield f"found nothing: {', '.join(names)}"


def _all_misses(passes: Sequence[PassFacts]) -> list[NearMissFacts]:
    return [miss for one in passes for miss in one.near_misses]


def near_miss_lines(misses: Sequence[NearMissFacts]) -> Iterator[str]:
    """Near misses for the same reason as one line: the pass, how many, the reason, the layers."""
    found: dict[tuple[str, str], list[NearMissFacts]] = {}
    for miss in misses:
        found.setdefault((miss.pass_name, miss.reason), []).append(miss)
    for (name, reason), members in list(found.items())[:_MOST_NEAR_MISSES]:
        layers = spell_numbers(sorted({m.layer for m in members if m.layer is not None}))
        where = f" (layers {layers})" if layers else ""
        if len(members) == 1 and members[0].node is not None:
            where = f" (%{members[0].node})"
        yield f"{name}, {format_count(len(members), 'time')}: {reason}{where}"
    if len(found) > _MOST_NEAR_MISSES:
        yield f"and {len(found) - _MOST_NEAR_MISSES} more reasons (--json has all)"


def spell_numbers(numbers: Sequence[int]) -> str:
    """Sorted numbers with stretches folded: "0-3, 7"."""
    stretches = []
    for _, pairs in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in pairs]
        few = len(members) == 1
        stretches.append(str(members[0]) if few else f"{members[0]}-{members[-1]}")
    return ", ".join(stretches)


def _files(facts: ArtifactFacts) -> Iterator[tuple[str, str]]:
    """Each file at the top, and each directory as one."""
    sizes: dict[str, list[int]] = {}
    for name, digest in facts.manifest.files.items():
        head, slash, _ = name.partition("/")
        sizes.setdefault(head + slash, []).append(digest.bytes)
    for name, members in sizes.items():
        count = f", {format_count(len(members), 'file')}" if name.endswith("/") else ""
        yield name, f"{format_size(sum(members))}{count}"
    yield "in all", format_size(sum(map(sum, sizes.values())))


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, "-" if value is None else json.dumps(value).strip('"')
