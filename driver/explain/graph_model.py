"""A program as a drawing sees it: blocks of cards, with equal layers and chains of views once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from ...ir.ops import Kind
from .facts import NodeFacts, ProgramFacts

VIEW = Kind.VIEW.value
PORT = "port"
_STATE = Kind.STATE.value
_PARTS = (
    ("attention", {Kind.ATTENTION.value, _STATE}),
    ("experts", {Kind.EXPERTS.value}),
    ("feed-forward", {Kind.MATRIX.value}),
)


@dataclass(frozen=True, slots=True)
class Card:
    """One box: a node, a chain of views, or (without nodes) a port where a value comes in.

    `copies` is how many layers it stands for; `reads` names the cards whose results it takes.
    """

    id: str
    kind: str
    title: str
    nodes: tuple[NodeFacts, ...]
    copies: int
    reads: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """Cards of one module of a layer, such as its attention; `title` is empty for a lone card."""

    title: str
    cards: tuple[Card, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A layer that stands for all equal to it, or what lies before or after the layers."""

    title: str
    copies: int
    parts: tuple[Part, ...]
    stacked: bool = False
    """Whether it belongs below the block before it, as what follows the last layer does."""


@dataclass(slots=True)
class _Builder:
    """Cards are made block by block; `makers` knows which card of the block makes a value.

    `state` is the last card that touched paged state: the next one comes after it.
    """

    prefix: str
    copies: int
    homes: Mapping[str, str]
    makers: dict[str, str] = field(default_factory=dict)
    ports: dict[str, Card] = field(default_factory=dict)
    state: str | None = None


def build_blocks(program: ProgramFacts) -> list[Block]:
    """The blocks of a drawing, in the order of the program."""
    homes = {name: _home(node) for node in program.nodes for name, _ in node.results}
    by_layer: dict[int, list[NodeFacts]] = {}
    before: list[NodeFacts] = []
    after: list[NodeFacts] = []
    for node in program.nodes:
        if node.layer is not None:
            by_layer.setdefault(node.layer, []).append(node)
        else:
            (after if by_layer else before).append(node)
    blocks = [_block("before the layers", before, 1, "a", homes)] if before else []
    for place, shown in enumerate(program.layers):
        nodes = by_layer.get(shown.layers[0], [])
        title = shown.title.partition(":")[0]
        stacked = bool(before) and place == 0
        blocks.append(_block(title, nodes, len(shown.layers), f"l{place}", homes, stacked))
    if after:
        blocks.append(_block("after the layers", after, 1, "z", homes, bool(by_layer)))
    return blocks


def _home(node: NodeFacts) -> str:
    where = "" if node.layer is None else f"layer {node.layer}: "
    return where + (node.module or node.op)


def _block(
    title: str,
    nodes: Sequence[NodeFacts],
    copies: int,
    prefix: str,
    homes: Mapping[str, str],
    stacked: bool = False,
) -> Block:
    builder = _Builder(prefix, copies, homes)
    parts = [
        Part(_part_title(name, chains), tuple(_cards(builder, chains)))
        for name, chains in _parts(nodes)
    ]
    if builder.ports:
        parts.insert(0, Part("", tuple(builder.ports.values())))
    return Block(title, copies, tuple(parts), stacked)


def _parts(nodes: Sequence[NodeFacts]) -> Iterator[tuple[str, list[tuple[NodeFacts, ...]]]]:
    """Nodes in a row from the same module of a layer, as chains of views and single nodes."""
    for name, members in groupby(nodes, key=lambda node: node.module.partition(".")[0]):
        yield name, _chains(list(members))


def _chains(nodes: Sequence[NodeFacts]) -> list[tuple[NodeFacts, ...]]:
    """Views that only look at another view's result, which nothing else reads, joined with it."""
    readers: dict[str, list[NodeFacts]] = {}
    for node in nodes:
        for name in set(_values(node)):
            readers.setdefault(name, []).append(node)
    chains: dict[str, list[NodeFacts]] = {}
    for node in nodes:
        source = next((n for n in _values(node) if n in chains), None)
        if (
            node.kind == VIEW
            and source is not None
            and chains[source][-1].kind == VIEW
            and len(readers[source]) == 1
        ):
            chain = chains.pop(source)
            chain.append(node)
        else:
            chain = [node]
        chains[node.label] = chain
    return [tuple(chain) for chain in chains.values()]


def _values(node: NodeFacts) -> Iterator[str]:
    return (text[1:] for text in node.inputs if text.startswith("%"))


def _cards(builder: _Builder, chains: Iterable[tuple[NodeFacts, ...]]) -> Iterator[Card]:
    for chain in chains:
        name = f"{builder.prefix}-{len(builder.makers)}"
        reads = tuple(dict.fromkeys(_sources(builder, chain)))
        if chain[-1].kind == _STATE:
            reads = tuple(dict.fromkeys((*reads, *filter(None, [builder.state]))))
            builder.state = name
        title = " · ".join(dict.fromkeys(node.op for node in chain))
        for node in chain:
            for result, _ in node.results:
                builder.makers[result] = name
        if not any(node.results for node in chain):
            builder.makers[f"\0{name}"] = name
        yield Card(name, chain[-1].kind, title, chain, builder.copies, reads)


def _sources(builder: _Builder, chain: Sequence[NodeFacts]) -> Iterator[str]:
    own = {name for node in chain for name, _ in node.results}
    for node in chain:
        for name in _values(node):
            if name in own:
                continue
            if name in builder.makers:
                yield builder.makers[name]
            elif name in builder.homes:
                yield _port(builder, name)


def _port(builder: _Builder, name: str) -> str:
    if name not in builder.ports:
        card = f"{builder.prefix}-in{len(builder.ports)}"
        builder.ports[name] = Card(card, PORT, _port_title(builder.homes[name]), (), 1)
    return builder.ports[name].id


def _port_title(home: str) -> str:
    """What made a value that comes in; of a layer only the module: which one differs by copy."""
    layer, colon, module = home.partition(": ")
    return f"from {module}" if colon and layer.startswith("layer ") else f"from {home}"


def _part_title(name: str, chains: Sequence[tuple[NodeFacts, ...]]) -> str:
    if len(chains) < 2:
        return ""
    kinds = {node.kind for chain in chains for node in chain}
    role = next((role for role, wanted in _PARTS if kinds & wanted), "")
    return f"{name} · {role}" if role and name else name or role
