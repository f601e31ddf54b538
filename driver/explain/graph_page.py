"""The page of `infc inspect --graph`: the drawing, what a click tells, and tables; one file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from ...ir.ops import Op, all_ops
from ...ir.sizes import format_size
from .amounts import format_bytes, format_intensity, format_operations, moved_bytes, printable
from .facts import ArtifactFacts, NodeFacts
from .graph_model import Block, build_blocks
from .graph_svg import attribute, draw
from .text import OP_HEAD, PASS_HEAD, costs_note, near_miss_lines, op_rows, pass_rows

_METRICS = (
    ("decode-bytes", "decode bytes"),
    ("decode-ops", "decode operations"),
    ("prefill-bytes", "prefill bytes"),
    ("prefill-ops", "prefill operations"),
)
_LEGEND = (
    ("matrix", "matrix product"),
    ("attention", "attention and its state"),
    ("experts", "experts"),
    ("norm", "norm"),
    ("other", "anything else"),
)


def html_page(facts: ArtifactFacts) -> str:
    """One page that needs nothing else: no network, no file beside it.

    Its policy lets only its own script run, known by digest, and nothing be loaded.
    """
    assert facts.program is not None
    blocks = build_blocks(facts.program)
    script = _read("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    name = str(facts.manifest.recipe.get("model") or facts.manifest.model.architecture)
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{attribute(name)} - infc</title>",
        f"<style>\n{_read('graph.css')}{_read('page.css')}</style>\n</head>\n<body>",
        *_header(facts, name),
        *_toolbar(),
        f'<main>\n<div class="canvas">\n{draw(facts, blocks, alone=False)}\n</div>',
        '<aside id="details" aria-live="polite"><h3>Nothing chosen</h3>',
        "<p>Click a card: its op, operands, weights, costs, and the pass that made it.</p></aside>",
        "</main>",
        *_tables(facts),
        f'<script type="application/json" id="cards">{_data(blocks)}</script>',
        f"<script>{script}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _header(facts: ArtifactFacts, name: str) -> Iterator[str]:
    manifest, memory = facts.manifest, facts.memory
    model = manifest.model
    what = f"{model.architecture} for {manifest.backend} on {manifest.target.name}"
    yield f"<header><h1>{attribute(name)}</h1>"
    yield f"<p>{attribute(what)}; {attribute(costs_note(facts))}</p></header>"
    heads = f"{model.num_heads} heads over {model.num_kv_heads}"
    tiles = [
        (f"{model.num_parameters / 1e6:,.1f} M", "parameters"),
        (f"{model.num_layers} × {model.hidden_size}", f"layers, {heads}"),
        (f"{model.vocab_size:,}", "vocabulary"),
        (f"{manifest.main.limits.max_context:,}", "tokens of context"),
        (format_size(memory.weights_bytes), "weights"),
        (format_size(memory.kv_token_bytes), "KV a token"),
        (format_size(memory.arena_bytes), "arena"),
    ]
    assert facts.program is not None
    for one in facts.program.schemes:
        label = one.dtype if one.scheme == "dense" else f"{one.scheme} {one.dtype}"
        tiles.append(
            (f"{one.bits_per_weight:.2f}".rstrip("0").rstrip("."), f"bits a weight, {label}")
        )
    yield '<div class="tiles">'
    for value, label in tiles:
        yield f'<div class="tile"><b>{attribute(value)}</b><span>{attribute(label)}</span></div>'
    yield "</div>"


def _toolbar() -> Iterator[str]:
    yield '<nav><span>Bars show</span><span class="choice">'
    for metric, label in _METRICS:
        pressed = "true" if metric == _METRICS[0][0] else "false"
        yield f'<button data-metric="{metric}" aria-pressed="{pressed}">{label}</button>'
    yield '</span><span class="legend">'
    for kind, label in _LEGEND:
        yield f'<span><i style="background:var(--{kind})"></i>{label}</span>'
    yield '</span><button id="theme">light or dark</button></nav>'


def _tables(facts: ArtifactFacts) -> Iterator[str]:
    assert facts.program is not None
    yield '<div class="tables">'
    yield from _table("Ops", OP_HEAD, list(op_rows(facts.program)))
    yield from _table("Passes that changed the program", PASS_HEAD, list(pass_rows(facts.passes)))
    misses = [miss for one in facts.passes for miss in one.near_misses]
    if misses:
        yield "<section><h2>Why not: near misses</h2>"
        for line in near_miss_lines(misses):
            yield f"<p>{attribute(line)}</p>"
        yield "</section>"
    yield "</div>"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if not rows:
        return
    classes = [' class="n"' if name.startswith(">") else "" for name in head]
    yield f"<section><h2>{attribute(title)}</h2><table><tr>"
    names = zip(head, classes, strict=True)
    yield "".join(f"<th{kind}>{attribute(name.lstrip('>'))}</th>" for name, kind in names) + "</tr>"
    for row in rows:
        total = ' class="sum"' if row[0].startswith("=") else ""
        cells = (
            f"<td{kind}>{attribute(cell.removeprefix('='))}</td>"
            for cell, kind in zip(row, classes, strict=True)
        )
        yield f"<tr{total}>{''.join(cells)}</tr>"
    yield "</table></section>"


def _data(blocks: Sequence[Block]) -> str:
    """What a click shows, by card; no character that could end the element it stands in."""
    docs = {op.name: op for op in all_ops()}
    cards = {
        card.id: [_details(node, docs[node.op], card.copies) for node in card.nodes]
        for block in blocks
        for part in block.parts
        for card in part.cards
        if card.nodes
    }
    text = json.dumps(cards, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _details(node: NodeFacts, op: Op, copies: int) -> dict[str, Any]:
    facts = [
        ("costs" if copies == 1 else f"costs, each of {copies}", _cost_lines(node)),
        ("results", [f"%{name}: {kind}" for name, kind in node.results]),
        ("reads", list(node.inputs)),
        ("weights", [f"{w.operand}: {w.type}, {format_bytes(w.num_bytes)}" for w in node.weights]),
        ("attributes", [f"{name} = {value}" for name, value in node.attrs.items()]),
        ("from", [node.source] if node.source else []),
        ("made by", [node.made_by or "as captured"]),
        ("why not", [f"{miss.pass_name}: {miss.reason}" for miss in node.near_misses]),
    ]
    shown = [(name, [printable(line) for line in lines]) for name, lines in facts if lines]
    return {"title": node.op, "doc": op.doc, "facts": shown}


def _cost_lines(node: NodeFacts) -> list[str]:
    lines = []
    for name, cost in (("decode", node.costs.decode), ("prefill", node.costs.prefill)):
        moved = moved_bytes(cost)
        if not moved and not cost.flops:
            continue
        work = f"{format_operations(cost.flops)} operations, {format_intensity(cost)} a byte"
        lines.append(f"{name}: {format_bytes(moved)}, {work}")
    return lines or ["none: it only looks at what is there"]
