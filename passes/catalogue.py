"""The classes of infc's own passes, each once, in the order in which they first stand."""

from __future__ import annotations

from typing import Final

from .adopt_formats import AdoptFormats
from .base import Pass
from .common_subexpressions import CommonSubexpressions
from .eliminate_dead_code import EliminateDeadCode
from .fold_constants import FoldConstants
from .fold_rotary_tables import FoldRotaryTables
from .fuse_add_norm import FuseAddNorm
from .fuse_gated_act import FuseGatedAct
from .fuse_gelu import FuseGelu
from .fuse_layer_norm import FuseLayerNorm
from .fuse_rms_norm import FuseRmsNorm
from .fuse_rope import FuseRope
from .group_loops import GroupLoops
from .lower_kv import LowerKv
from .merge_linears import MergeGateUp, MergeQkv
from .methods.calibrate_weights import CalibrateWeights
from .methods.scale_channels import ScaleChannels
from .narrow_activations import NarrowActivations
from .narrow_matrices import NarrowMatrices
from .one_block_each import OneBlockEach
from .plan_graphs import PlanGraphs
from .plan_memory import PlanMemory
from .quantize_weights import QuantizeWeights
from .remove_no_op import RemoveNoOp
from .share_kv import ShareKv
from .sink_logits_rows import SinkLogitsRows
from .squeeze_unit_batch import SqueezeUnitBatch

OUR_PASSES: Final[tuple[type[Pass], ...]] = (
    EliminateDeadCode,
    SqueezeUnitBatch,
    RemoveNoOp,
    CommonSubexpressions,
    FoldConstants,
    FoldRotaryTables,
    ShareKv,
    AdoptFormats,
    NarrowMatrices,
    ScaleChannels,
    QuantizeWeights,
    CalibrateWeights,
    FuseLayerNorm,
    FuseRmsNorm,
    FuseRope,
    FuseGelu,
    MergeQkv,
    MergeGateUp,
    FuseGatedAct,
    FuseAddNorm,
    SinkLogitsRows,
    NarrowActivations,
    LowerKv,
    GroupLoops,
    PlanMemory,
    PlanGraphs,
    OneBlockEach,
)
