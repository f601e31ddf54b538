"""What an artifact holds, told for people: model, target, memory, ops, passes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ..ir.artifact import Artifact
from ..ir.manifest import Manifest
from ..ir.sizes import format_count, format_size


def describe_artifact(artifact: Artifact) -> str:
    """Several short tables. Needs neither torch nor the compiler."""
    parts = [
        _pairs(_summary(artifact)),
        "memory\n" + _pairs(_memory(artifact.manifest), indent=2),
        "recipe\n" + _pairs(_flatten(artifact.manifest.recipe), indent=2),
    ]
    if ops := _ops(artifact):
        parts.append("ops\n" + _pairs(((op, str(count)) for op, count in ops), indent=2))
    if passes := _passes(artifact):
        parts.append("passes\n" + _pairs(passes, indent=2))
    return "\n\n".join(parts)


def _summary(artifact: Artifact) -> Iterator[tuple[str, str]]:
    manifest = artifact.manifest
    model, limits = manifest.model, manifest.limits
    yield "artifact", f"{artifact.path} ({artifact.identity[:12]})"
    yield "made by", f"infc {manifest.infc_version}"
    yield "model", f"{model.architecture}, {model.num_parameters / 1e6:,.1f} M parameters"
    heads = f"{model.num_heads} heads over {model.num_kv_heads}"
    yield "shape", f"{model.num_layers} layers of {model.hidden_size}, {heads}"
    yield "vocabulary", f"{model.vocab_size}"
    yield "backend", f"{manifest.backend} ({manifest.entry.file})"
    yield "target", f"{manifest.target.name}"
    yield "context", f"{limits.max_context} tokens"
    step = f"{limits.step_tokens} tokens of {limits.max_sequences} sequences"
    yield "step", f"{step}, {limits.logit_rows} rows of logits"
    if manifest.tokenizer is None:
        yield "tokenizer", "none: token ids only"
    else:
        chat = "with" if manifest.tokenizer.chat_template else "without"
        yield "tokenizer", f"ends at {list(manifest.tokenizer.eos)}, {chat} a chat template"


def _memory(manifest: Manifest) -> Iterator[tuple[str, str]]:
    weights = manifest.files[manifest.weights.file].bytes
    yield "weights", f"{format_size(weights)}, mapped"
    yield "arena", format_size(manifest.arena_bytes)
    for group in manifest.kv.groups:
        kind = "full attention" if group.window is None else f"window of {group.window}"
        each = format_size(group.bytes_per_block() // group.block_size)
        block = f"{format_size(group.bytes_per_block())} a block of {group.block_size}"
        yield f"kv {group.name}", f"{each} a token, {block}; {len(group.layers)} layers, {kind}"
    yield "all files", format_size(sum(digest.bytes for digest in manifest.files.values()))


def _ops(artifact: Artifact) -> list[tuple[str, int]]:
    from ..ir.text import parse_program

    path = artifact.path / "program.ir"
    if not path.is_file():
        return []
    program = parse_program(path.read_text(encoding="utf-8"), source=str(path))
    return Counter(node.op for node in program.nodes).most_common()


def _passes(artifact: Artifact) -> list[tuple[str, str]]:
    path = artifact.path / "report.json"
    if not path.is_file():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    return [(entry["name"], _pass_line(entry)) for entry in report.get("passes", ())]


def _pass_line(entry: Mapping[str, Any]) -> str:
    near = len(entry.get("near_misses", ()))
    text = format_count(entry.get("matches", 0), "match", "matches")
    return f"{text}, {format_count(near, 'near miss', 'near misses')}" if near else text


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, "-" if value is None else json.dumps(value).strip('"')


def _pairs(pairs: Any, indent: int = 0) -> str:
    rows = list(pairs)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{'':{indent}}{name:<{width}}  {text}" for name, text in rows)
