"""What can be said of an artifact, as values: read by people's programs, rendered elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...ir.cost import Cost
from ...ir.manifest import Manifest
from ...ir.roofline import Ceilings


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The two steps that costs are given for.

    A decode step of one token for each of `batch` sequences, and a step of `tokens` tokens of
    one prompt; when the step is over, each sequence has `context` tokens stored.
    """

    batch: int
    context: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Bytes and operations of the two steps of a Workload; of a captured program no decode."""

    decode: Cost
    prefill: Cost

    def __add__(self, other: Costs) -> Costs:
        return Costs(decode=self.decode + other.decode, prefill=self.prefill + other.prefill)


@dataclass(frozen=True, slots=True)
class PassCost:
    """What a step of the whole program moves and computes after a pass, as a report records it."""

    bytes_read: int
    bytes_written: int
    flops: int


NO_COSTS = Costs(decode=Cost(), prefill=Cost())


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFacts:
    """A weight that a node reads. `operand` is what the op calls it, `type` such as bf16[8, 4].

    `num_elements` of codes is that of the weights they stand for.
    """

    name: str
    operand: str
    type: str
    num_bytes: int
    num_elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NearMissFacts:
    """Where a pass nearly matched, and why it did not; `node` is None if it names none."""

    pass_name: str
    node: str | None
    layer: int | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """One node of the program.

    `label` is its first result (op and layer where it has none), `module` where in its layer it
    came from, `made_by` the pass that made it (None: as captured, or not recorded). `inputs` are
    operands as IR text spells them, `results` pairs of name and type.
    """

    label: str
    op: str
    kind: str
    layer: int | None
    module: str
    source: str | None
    made_by: str | None
    inputs: tuple[str, ...]
    results: tuple[tuple[str, str], ...]
    attrs: Mapping[str, str]
    weights: tuple[WeightFacts, ...]
    near_misses: tuple[NearMissFacts, ...]
    costs: Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class OpFacts:
    """All nodes of one op: how many, those that passes made by pass, and their costs together."""

    op: str
    count: int
    made_by: Mapping[str, int]
    costs: Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """Layers that are equal but for their weights' values; `costs` and bytes are of one of them."""

    title: str
    layers: tuple[int, ...]
    nodes: int
    kv_group: str | None
    weight_bytes: int
    costs: Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeFacts:
    """How the weights of matrix products are held: `dense` types, or a scheme of quantization."""

    scheme: str
    dtype: str
    matrices: int
    num_elements: int
    num_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of one element, its share of scales included."""
        return 8 * self.num_bytes / max(1, self.num_elements)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFacts:
    """Layers whose attention has one form: query heads of `head_dim` over KV heads, a window."""

    layers: tuple[int, ...]
    heads: int
    head_dim: int
    kv_heads: int
    window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeFacts:
    """What the program's nodes say of the model; parameters are those of tensors that are read.

    `sharing` are the layers that read the cache of another one, and have none of their own.
    """

    num_layers: int
    width: int
    vocabulary: int
    num_parameters: int
    attention: tuple[AttentionFacts, ...]
    sharing: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramFacts:
    """The program that the artifact runs, node by node and summed up."""

    phase: str
    shape: ShapeFacts
    nodes: tuple[NodeFacts, ...]
    ops: tuple[OpFacts, ...]
    layers: tuple[LayerFacts, ...]
    outside: Costs
    total: Costs
    schemes: tuple[SchemeFacts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassFacts:
    """What one pass of the compilation did; costs are of the largest step there may be.

    `op_changes` says how many nodes of each op it added or took away; None where the artifact
    does not record it. `distance` is how far a lossy pass moved the model's predictions: `kl`
    (nats), `top1` (a share), `error` (relative to a row's largest logit), over `rows` tokens of
    `what`.
    """

    name: str
    phase: str
    contract: str | None
    options: Mapping[str, object]
    matches: int
    near_misses: tuple[NearMissFacts, ...]
    nodes_before: int | None
    nodes: int
    op_changes: Mapping[str, int] | None
    before: PassCost | None
    after: PassCost
    verified: str
    distance: Mapping[str, int | float | str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGroupFacts:
    """One kind of paged state: bytes of a token over all its layers, and of a block."""

    name: str
    layers: tuple[int, ...]
    num_kv_heads: int
    key_head_dim: int
    value_head_dim: int
    dtype: str
    window: int | None
    block_size: int
    token_bytes: int
    block_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFacts:
    """Another kind of paged state (`kind`, see `ir/resources.py`), with the same figures."""

    name: str
    kind: str
    layers: tuple[int, ...]
    dtype: str
    block_size: int
    token_bytes: int
    block_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFacts:
    """What serving takes. `logits_bytes` are those of the most rows that a step may ask for, with
    their hidden states, in float32.

    `largest_batch` is how many sequences of `context` tokens `budget` bytes hold beside weights,
    arena and logits, at most `max_batch`, which was compiled in; 0 where not even one fits. Their
    KV takes `batch_kv_bytes`, which serving must be given: by itself it takes half of what is free.
    """

    weights_bytes: int
    arena_bytes: int
    logits_bytes: int
    groups: tuple[KvGroupFacts | StoredFacts, ...]
    kv_token_bytes: int
    budget: int
    context: int
    largest_batch: int
    batch_kv_bytes: int
    max_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherProgramFacts:
    """A program that the artifact has beside the model's step; costs are of its own `workload`.

    `weights_bytes` are those of its own file of weights: `num_shared` of its `num_tensors` are in
    the file of the main program. `handed_over_bytes` is the most that a step returns. What it takes
    and gives, its limits and its arena are in the manifest.
    """

    name: str
    workload: Workload
    weights_bytes: int
    num_tensors: int
    num_shared: int
    handed_over_bytes: int
    groups: tuple[KvGroupFacts | StoredFacts, ...]
    program: ProgramFacts | None
    passes: tuple[PassFacts, ...]
    verification: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedOp:
    """All nodes of one op: seconds that they must take in each step, at a machine's ceilings."""

    op: str
    count: int
    decode: float
    prefill: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """The roofline of the two steps: seconds by op, and in all; `where` says at whose ceilings."""

    where: str
    ceilings: Ceilings
    ops: tuple[PredictedOp, ...]
    decode: float
    prefill: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FormFacts:
    """One form of steps on a GPU: the launches of a step that samples, in all and of a layer.

    `eager` of them are in no graph. Of layers, it is what most of them have.
    """

    name: str
    max_tokens: int
    launches: int
    layer_launches: int
    eager: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchFacts:
    """The launches of an artifact for a GPU, and the kernels that they are of.

    Registers and spilled bytes are the most of a thread, shared bytes those of a block; `decode`
    is the roofline of the decode step with the gaps between its launches, in seconds.
    """

    forms: tuple[FormFacts, ...]
    kernels: int
    image_bytes: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    buckets: tuple[int, ...]
    pieces: tuple[int, ...]
    decode: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFacts:
    """Everything that `infc inspect` says; no `program`, no `passes` where none were recorded.

    `verification` has a line for each phase of the compilation: what was compared after it.
    `predictions` are there where the machine's ceilings are known, `certificate` (see
    `driver/certificate.py`) where the report has one. `others` are the programs beside the model's
    step, of which everything else is. `launches` are there where the backend made any.
    """

    path: str
    identity: str
    manifest: Manifest
    workload: Workload
    program: ProgramFacts | None
    passes: tuple[PassFacts, ...]
    verification: tuple[str, ...]
    memory: MemoryFacts
    predictions: Predictions | None = None
    certificate: Mapping[str, Any] | None = None
    others: tuple[OtherProgramFacts, ...] = ()
    launches: LaunchFacts | None = None
