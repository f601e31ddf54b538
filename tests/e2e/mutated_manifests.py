"""Opens an artifact with one value of its manifest changed after the other, and lets it write.

Run as a program, because a fault may end the process: `mutated_manifests.py ARTIFACT FIELDS`, with
the fields at the top whose values are changed. It says which change comes next before it makes it,
and in the end what became of all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import infc
from infc.ir.artifact import Verification
from infc.ir.errors import InfcError
from infc.ir.manifest import canonical_json

Place = tuple[str | int, ...]

DEEP = json.loads("[" * 900 + "]" * 900)
"""Nested beyond what a writer of JSON takes, and not what a reader does."""

ANYTHING: tuple[Any, ...] = (None, "", "x", "\ud800", 0, 1.5, [], {}, DEEP)


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value that holds no others, and every list, of whose items the first and the last.

    Of the files three: their entries are all alike.
    """
    if isinstance(value, dict):
        for key, item in list(value.items())[: 3 if place == ("files",) else None]:
            yield from leaves(item, (*place, key))
        return
    yield place, value
    if isinstance(value, list) and value:
        for index in sorted({0, len(value) - 1}):
            yield from leaves(value[index], (*place, index))


def mutations(value: Any, turn: int) -> Iterator[Any]:
    """Other values of the same type, and each turn some more of any."""
    if isinstance(value, bool) or value is None:
        yield from (True, False, 1, -1)
    elif isinstance(value, (int, float)):
        yield from (value + 1, value * 2, value // 2, -value, 2**31, 2**62, 10**400)
    elif isinstance(value, str):
        yield from (value + "x", value[:-1], "../" + value, "f16", value * 5000)
    elif isinstance(value, list):
        yield from (value[:-1], value + value[-1:], value[::-1], [None])
    yield from (ANYTHING[(3 * turn + i) % len(ANYTHING)] for i in range(3))


def changed(data: dict[str, Any], place: Place, value: Any) -> str:
    """The text of a manifest with one other value, and the digest that belongs to it."""
    data = copy.deepcopy(data)
    inner: Any = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    digest = hashlib.sha256(canonical_json(data).encode()).hexdigest()
    return canonical_json({**data, "digest": digest})


def attempt(artifact: Path, verify: Verification) -> str:
    """What becomes of opening it and asking for a few tokens."""
    try:
        with infc.LLM(artifact, verify=verify) as llm:
            params = infc.SamplingParams(max_tokens=3, min_tokens=2, prompt_logprobs=1)
            llm.generate([list(range(1, 40))], params)
            if llm.engine.tokenizer is not None:
                llm.generate("the cat", params)
    except InfcError:
        return "refused"
    return "works"


def run(artifact: Path, fields: list[str]) -> dict[str, int]:
    """Every change in turn; ends at the first that is neither refused nor works."""
    manifest = artifact / "manifest.json"
    data = json.loads(manifest.read_text())
    del data["digest"]
    count = {"refused": 0, "works": 0}
    for turn, (place, value) in enumerate(leaves({name: data[name] for name in fields})):
        for other in mutations(value, turn):
            print(f"{place} = {repr(other)[:100]}", flush=True)
            try:
                text = changed(data, place, other)
            except (ValueError, RecursionError):
                continue
            manifest.write_text(text, encoding="utf-8")
            count[attempt(artifact, "full" if place[0] == "files" else "none")] += 1
    return count


if __name__ == "__main__":
    try:
        print(json.dumps(run(Path(sys.argv[1]), sys.argv[2:])))
    except Exception:
        traceback.print_exc(limit=-6)
        sys.exit(1)
