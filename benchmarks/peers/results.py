"""What a run measured, as plain values: written as JSON while it goes, read back for tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

START = "start"
"""In a sample, the workload of a fresh process: `first` is from its start to its first token."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request of one contestant in one round. Times in seconds; `others` is the share of the
    machine's CPU time that others had meanwhile."""

    round: int
    contestant: str
    workload: str
    first: float
    seconds: float
    tokens: int
    peak_rss_bytes: int
    others: float


@dataclass(frozen=True, slots=True)
class CeilingSample:
    """What the machine gave at a moment of a round, beside turns of `workload`."""

    round: int
    workload: str
    read_bytes_per_s: float
    bf16_per_s: float
    int8_per_s: float


@dataclass(frozen=True, slots=True)
class ShapeFacts:
    """What the shares need to know of a model: elements of its matrices (a tied embedding
    counts once), and operations of a prefill of the benchmark's length, attention included."""

    matrix_elements: int
    prefill_operations: float


@dataclass(frozen=True, slots=True)
class Entrant:
    """A contestant that took part. `weight_bytes`: what its products read for one token."""

    bits: int
    is_infc: bool
    version: str
    weight_bytes: int


@dataclass(slots=True)
class ShapeRun:
    """All of one shape. `absent` and `failed` say why: by contestant, and one line a failure."""

    shape: str
    facts: ShapeFacts
    entrants: dict[str, Entrant] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    ceilings: list[CeilingSample] = field(default_factory=list)


@dataclass(slots=True)
class Results:
    """A run: the machine, and its shapes."""

    machine: dict[str, str]
    shapes: list[ShapeRun] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.rename(path)

    @staticmethod
    def read(path: Path) -> Results:
        """The inverse of `write`."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return Results(data["machine"], [_shape_run(shape) for shape in data["shapes"]])


def _shape_run(data: Mapping[str, Any]) -> ShapeRun:
    return ShapeRun(
        shape=data["shape"],
        facts=ShapeFacts(**data["facts"]),
        entrants={name: Entrant(**entrant) for name, entrant in data["entrants"].items()},
        absent=data["absent"],
        failed=data["failed"],
        samples=[Sample(**sample) for sample in data["samples"]],
        ceilings=[CeilingSample(**sample) for sample in data["ceilings"]],
    )


def read_facts(checkpoint: Path, prompt_tokens: int) -> ShapeFacts:
    """The facts of a checkpoint, for a prefill of so many tokens that wants one row of logits."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    with (checkpoint / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = [t["shape"] for name, t in header.items() if name != "__metadata__"]
    elements = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    head = config["vocab_size"] * config["hidden_size"]
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    pairs = prompt_tokens * (prompt_tokens + 1) / 2
    attention = 4 * config["num_hidden_layers"] * heads * width * pairs
    matrices = 2 * (elements - head) * prompt_tokens + 2 * head
    return ShapeFacts(elements, matrices + attention)
