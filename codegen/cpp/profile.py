"""The profile of a step: which of its statements are timed, and what each of them is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from .calls import BARRIER, Call
from .roll import Item, Loop


def is_timed(call: Call) -> bool:
    """Whether a statement has an entry: all but those that only decide what comes next."""
    return call is BARRIER or bool(call.nodes or call.comment)


def num_entries(items: Sequence[Item]) -> int:
    """How many entries the profile has: one a timed statement, whatever a loop repeats."""
    return sum(1 for _ in _timed(items))


def profile_text(items: Sequence[Item]) -> str:
    """What each entry times, in the order of the marks in the source, as JSON.

    `name` is the statement's comment or "barrier", `nodes` are the labels of what it computes: in
    a loop over layers those of all layers. A barrier waits for what stands before it.
    """
    entries = [
        {"name": "barrier" if call is BARRIER else call.comment, "nodes": list(nodes)}
        for call, nodes in _timed(items)
    ]
    lines = ",\n".join(f" {json.dumps(entry)}" for entry in entries)
    return f'{{"entries": [\n{lines}\n]}}\n'


def _timed(items: Sequence[Item]) -> Iterator[tuple[Call, tuple[str, ...]]]:
    for item in items:
        if isinstance(item, Loop):
            pairs = zip(item.body, item.nodes, strict=True)
        else:
            pairs = zip((item,), (item.nodes,), strict=True)
        yield from ((call, nodes) for call, nodes in pairs if is_timed(call))
