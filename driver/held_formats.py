"""In what formats an artifact holds its weights, by class: embeddings, layers, head, the rest."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..ir.ops import Kind

if TYPE_CHECKING:
    from ..ir.program import Program
    from .explain.facts import NodeFacts, WeightFacts

EMBEDDINGS, LAYERS, HEAD, OTHER = "embeddings", "layers", "head", "other"
TIED = f"{EMBEDDINGS} and {HEAD}"
"""One matrix, in which tokens are looked up and which computes the logits."""
_PRODUCTS = (Kind.MATRIX.value, Kind.EXPERTS.value)


@dataclass(slots=True)
class HeldFormat:
    """Weights of one class in one format; `num_bytes` has scales and all else that they need."""

    place: str
    held: str
    tensors: int = 0
    num_weights: int = 0
    num_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Bits of one weight, its share of scales included."""
        return 8 * self.num_bytes / max(1, self.num_weights)

    def as_data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "class": self.place,
            "format": self.held,
            "tensors": self.tensors,
            "weights": self.num_weights,
            "bytes": self.num_bytes,
            "bits_per_weight": round(self.bits_per_weight, 3),
        }


@dataclass(slots=True)
class HeldFormats:
    """All weights of a program, each once: under the first class that reads it."""

    formats: dict[tuple[str, str], HeldFormat] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)

    @property
    def bits_per_weight(self) -> float:
        """Of embeddings, matrices of the layers and the head together."""
        counted = [one for one in self.formats.values() if one.place != OTHER]
        size = sum(one.num_bytes for one in counted)
        return 8 * size / max(1, sum(one.num_weights for one in counted))

    def as_data(self) -> list[dict[str, Any]]:
        """As plain data, in the order of the program."""
        return [one.as_data() for one in self.formats.values()]

    def add(self, node: NodeFacts, tables: Set[str], heads: Set[str]) -> None:
        """Count what a node reads and none before it did.

        `tables` have a row for each token, and products outside layers read `heads`.
        """
        fresh = [one for one in node.weights if one.name not in self._seen]
        self._seen.update(one.name for one in fresh)
        main = [one for one in fresh if _is_matrix(node, one, tables)]
        place = OTHER
        if main:
            place = _place(node, main[0].name in heads)
        scheme = node.attrs.get("scheme", "").strip('"')
        for one in fresh:
            belongs = bool(main) and (one in main or one.operand.endswith("scale"))
            dtype = one.type.partition("[")[0]
            held = (scheme or dtype) if belongs else dtype
            key = (place if belongs else OTHER, held)
            entry = self.formats.setdefault(key, HeldFormat(*key))
            entry.num_bytes += one.num_bytes
            if one in main or not belongs:
                entry.tensors += 1
                entry.num_weights += one.num_elements


def held_formats(program: Program) -> HeldFormats:
    """The formats of a program's weights."""
    from .explain.facts import Workload
    from .explain.measure import measure_program

    context = max(2, program.spec.max_context)
    facts = measure_program(program, Workload(batch=1, context=context, tokens=1))
    found = HeldFormats()
    vocab_size = program.spec.vocab_size
    kinds = {name: one.type for name, one in program.weights.items()}
    tables = {name for name, one in kinds.items() if one.rank == 2 and one.shape[0] == vocab_size}
    heads = {
        weight.name
        for node in facts.nodes
        if node.kind in _PRODUCTS and node.layer is None
        for weight in node.weights
    }
    for node in facts.nodes:
        found.add(node, tables, heads)
    return found


def _is_matrix(node: NodeFacts, weight: WeightFacts, tables: Set[str]) -> bool:
    if node.kind == Kind.GATHER.value:
        # A table of positions is no embedding of tokens.
        return weight.name in tables and not weight.operand.endswith("scale")
    is_product = node.kind in _PRODUCTS
    return is_product and "bias" not in weight.operand and not weight.operand.endswith("scale")


def _place(node: NodeFacts, is_head: bool) -> str:
    if node.kind == Kind.GATHER.value:
        return TIED if is_head else EMBEDDINGS
    return HEAD if node.layer is None else LAYERS
