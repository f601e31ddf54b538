"""The programs of an artifact beside the model's step, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ...ir.manifest import CompiledProgram
from ...ir.shapes import parse_type
from ...ir.sizes import format_count, format_size
from ...ir.types import Sym
from .facts import ArtifactFacts, OtherProgramFacts
from .text import OP_HEAD, WIDTH, Page, group_text, op_rows, render_artifact, say_passes

_HEAD = ("program", "inputs", "outputs", ">weights", ">arena", ">handed over", ">kv a token")


def render_programs(facts: ArtifactFacts, *, width: int = WIDTH, color: bool = False) -> str:
    """The whole report of an artifact, all of its programs included."""
    text = render_artifact(facts, width=width, color=color)
    if not facts.others:
        return text
    page = Page(width, color)
    page.table("programs", _HEAD, [*_rows(facts)])
    for other in facts.others:
        page.title(f"== {other.name} ==")
        page.pairs("", _pairs(facts.manifest.programs[other.name], other))
        if other.program is not None:
            page.table("ops", OP_HEAD, [*op_rows(other.program)])
        say_passes(page, other.passes, other.verification)
    return f"{text}\n{page.text()}"


def _rows(facts: ArtifactFacts) -> Iterator[Sequence[str]]:
    memory, programs = facts.memory, facts.manifest.programs
    main = (memory.weights_bytes, memory.arena_bytes, memory.logits_bytes, memory.kv_token_bytes)
    sums = {"main": main} | {
        one.name: (
            one.weights_bytes,
            programs[one.name].arena_bytes,
            one.handed_over_bytes,
            sum(group.token_bytes for group in one.groups),
        )
        for one in facts.others
    }
    for name, sizes in sums.items():
        said = programs[name]
        arrays = (", ".join(said.inputs), ", ".join(said.outputs))
        yield (name, *arrays, *map(format_size, sizes))
    yield (
        "=in all",
        "",
        "",
        *(format_size(sum(column)) for column in zip(*sums.values(), strict=True)),
    )


def _pairs(said: CompiledProgram, other: OtherProgramFacts) -> Iterator[tuple[str, str]]:
    yield "inputs", _arrays(said.inputs)
    yield "outputs", _arrays(said.outputs)
    yield "code", f"{said.entry.file} ({said.entry.kind})"
    limits = said.limits
    sizes = {"T": limits.step_tokens, "R": limits.logit_rows, **limits.sizes}
    kinds = (*said.inputs.values(), *said.outputs.values())
    used = {dim.name for kind in kinds for dim in parse_type(kind).shape if isinstance(dim, Sym)}
    most = ", ".join(f"{name} to {size}" for name, size in sizes.items() if name in used)
    context = [f"{limits.max_context} tokens of context"] if other.groups else []
    yield "limits", ", ".join([*context, *([most] if most else [])])
    tensors = format_count(other.num_tensors, "tensor")
    shared = f"{other.num_shared} of {tensors} in the file of the main program"
    yield "weights", f"{format_size(other.weights_bytes)}, {shared}"
    yield "arena", format_size(said.arena_bytes)
    for group in other.groups:
        yield f"kv {group.name}", group_text(group)
    if said.rank is not None:
        yield "rank", str(said.rank)


def _arrays(types: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in types.items())
