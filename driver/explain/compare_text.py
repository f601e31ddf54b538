"""Differences as text: counts and costs first, lines of IR after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ...ir.cost import Cost
from ...ir.sizes import format_count
from .amounts import format_bytes, format_change, format_operations, moved_bytes, printable
from .differences import ArtifactDiff, Change, Diff, DumpsDiff, PassDiff, ProgramDiff
from .facts import PassFacts
from .text import WIDTH, Page

_STYLES = {"-": "red", "+": "green"}
_LONGEST = 72

Spell = Callable[[PassFacts], str]


def render_diff(diff: Diff, *, stat: bool = False, width: int = WIDTH, color: bool = False) -> str:
    """The whole difference; with `stat` no lines of IR. Empty where there is none."""
    page = Page(width, color)
    if diff.equal:
        return ""
    if isinstance(diff, ArtifactDiff):
        _artifacts(page, diff, stat)
    elif isinstance(diff, DumpsDiff):
        _dumps(page, diff, stat)
    else:
        _program(page, diff, stat)
    return page.text()


def _artifacts(page: Page, diff: ArtifactDiff, stat: bool) -> None:
    page.lines("recipe", _change_lines(diff.recipe))
    page.lines("manifest", _change_lines(diff.manifest))
    page.lines("files", _change_lines(diff.files))
    page.table("passes", _PASS_HEAD, [*map(_pass_row, diff.passes)])
    if diff.same_passes:
        count = format_count(diff.same_passes, "pass", "passes")
        page.lines("", [f"{count} did the same in both"])
    for name, program in (("captured program", diff.captured), ("final program", diff.final)):
        _stage(page, name, program, stat)
    for other in diff.others:
        if other.only is not None:
            page.title(f"== program {other.name}: {other.only} alone ==")
        _stage(page, f"captured program {other.name}", other.captured, stat)
        _stage(page, f"final program {other.name}", other.final, stat)


def _stage(page: Page, name: str, program: ProgramDiff | None, stat: bool) -> None:
    if program is not None and not program.equal:
        page.title(f"== {name} ==")
        _program(page, program, stat)


def _dumps(page: Page, diff: DumpsDiff, stat: bool) -> None:
    for stage in diff.stages:
        if stage.program is None:
            side = "before" if stage.only_before else "after"
            page.title(f"== {stage.name}: {side} alone ==")
        elif stage.equal:
            page.title(f"== {stage.name}: equal ==")
        else:
            page.title(f"== {stage.name} ==")
            _program(page, stage.program, stat)


def _program(page: Page, diff: ProgramDiff, stat: bool) -> None:
    page.pairs("", _sums(diff))
    rows = [(c.op, str(c.before), str(c.after), f"{c.after - c.before:+d}") for c in diff.ops]
    page.table("ops", ("op", ">before", ">after", ">change"), rows)
    if diff.moved and not diff.hunks:
        page.lines("", ["only places in the arena differ"])
    if stat:
        return
    for hunk in diff.hunks:
        page.title(f"@@ {hunk.title} @@")
        for line in hunk.lines:
            page.console.print(printable(line), style=_STYLES.get(line[:1]), soft_wrap=True)


def _sums(diff: ProgramDiff) -> Iterator[tuple[str, str]]:
    before, after = diff.costs_before, diff.costs_after
    yield "nodes", _arrow(str(diff.nodes_before), str(diff.nodes_after))
    for step, a, b in (
        (f"decode after {diff.tokens}:", before.decode, after.decode),
        (f"prefill of {diff.tokens}:", before.prefill, after.prefill),
    ):
        if a == b or Cost() in (a, b):  # a program that is not lowered has no decode step
            continue
        moved = _arrow(format_bytes(moved_bytes(a)), format_bytes(moved_bytes(b)))
        work = _arrow(format_operations(a.flops), format_operations(b.flops))
        yield f"{step} bytes", _with(moved, format_change(moved_bytes(a), moved_bytes(b)))
        yield f"{step} operations", _with(work, format_change(a.flops, b.flops))


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def _with(text: str, note: str) -> str:
    return f"{text}  ({note})" if note else text


def _change_lines(changes: Iterable[Change]) -> Iterator[str]:
    for change in changes:
        if change.before is None:
            yield f"+ {change.name}: {_short(change.after)}"
        elif change.after is None:
            yield f"- {change.name}: {_short(change.before)}"
        else:
            yield f"  {change.name}: {_short(change.before)} -> {_short(change.after)}"


def _short(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


_PASS_HEAD = ("pass", ">matches", ">near misses", ">nodes", ">bytes", ">ops", "what it did to ops")


def _pass_row(diff: PassDiff) -> Sequence[str]:
    a, b = diff.before, diff.after
    mark = "- " if b is None else "+ " if a is None else "  "

    def both(spell: Spell) -> str:
        texts = ["" if one is None else spell(one) for one in (a, b)]
        return texts[0] or texts[1] if "" in texts else _arrow(*texts)

    return (
        mark + diff.name,
        both(lambda one: str(one.matches)),
        both(lambda one: str(len(one.near_misses))),
        both(lambda one: str(one.nodes)),
        both(lambda one: format_bytes(moved_bytes(one.after))),
        both(lambda one: format_operations(one.after.flops)),
        both(_op_changes),
    )


def _op_changes(one: PassFacts) -> str:
    changes = one.op_changes or {}
    return ", ".join(f"{change:+d} {op}" for op, change in changes.items()) or "-"
