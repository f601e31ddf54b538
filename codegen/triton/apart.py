"""Places for what a launch of several nodes writes, apart from all that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.plan import loop_groups
from ...ir.program import Node, Value
from .buffers import Buffer, product
from .emitter import Emitter, Held, Rows


@dataclass(frozen=True, slots=True)
class Apart:
    """The results of a launch; `first` is the first node that it computes."""

    emitter: Emitter
    first: Node

    def output(self, value: Value, read: Sequence[Rows | Buffer]) -> Buffer:
        """The buffer of a result: where the plan has it, or elsewhere if something read is there.

        Places elsewhere are used again once no node is left that reads them.
        """
        e = self.emitter
        size = e.most_bytes(value.type)
        offset = e.planned_offset(value)
        if offset is None or not any(_overlap(e, offset, size, rows) for rows in read):
            return e.output(value)
        places = node_places(e)
        now, until = places[id(self.first)], last_read(e, value, places)
        for held in e.held:
            if held.until < now and held.num_bytes >= size:
                held.until = until
                return e.output_at(value, held.offset)
        held = Held(e.reserve(size), size, until)
        e.held.append(held)
        return e.output_at(value, held.offset)


def _overlap(e: Emitter, offset: int, size: int, read: Rows | Buffer) -> bool:
    buffer = read if isinstance(read, Buffer) else read.buffer
    if buffer.pointer.space != "arena":
        return False
    if isinstance(read, Rows):
        elements = (e.most(read.count) - 1) * read.stride + read.length
    else:
        assert buffer.is_dense, "what is read lies in one piece"
        elements = e.most(product(buffer.shape))
    end = buffer.pointer.offset + elements * buffer.dtype.size_bytes
    return buffer.pointer.offset < offset + size and offset < end


def node_places(e: Emitter) -> dict[int, int]:
    """Where each node is carried out, by its identity: groups of loops where their last one is."""
    nodes = e.program.nodes
    places = {id(node): place for place, node in enumerate(nodes)}
    by_output = {node.outputs[0].name: node for node in nodes if node.outputs}
    for names in loop_groups(e.program):
        last = max(places[id(by_output[name])] for name in names)
        places.update({id(by_output[name]): last for name in names})
    return places


def last_read(e: Emitter, value: Value, places: dict[int, int]) -> int:
    """Where a value is read last, also by way of the results of its readers that may be views."""
    last = -1 if value not in e.program.outputs else len(places)
    for node in e.consumers.get(value.name, []):
        last = max(last, places[id(node)])
        if node.op in _VIEWS:
            last = max(last, last_read(e, node.output, places))
    made = next(node for node in e.program.nodes if value in node.outputs)
    return max(last, places[id(made)])


_VIEWS = frozenset({"reshape", "transpose", "expand", "slice"})
