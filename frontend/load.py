"""A checkpoint directory -> the captured program, with its spec, guards passed, weights lazy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..ir.analyses import check_mixer_per_layer, check_token_locality
from ..ir.errors import ContextError, UnsupportedModelError, UsageError
from ..ir.manifest import LEAST_CONTEXT
from ..ir.program import ModelSpec, Node, Program, WeightExpr, vocabulary_size
from ..ir.torch_types import to_torch
from ..ir.types import DType, SymbolRange
from ..ir.verify import verify
from .checkpoint import Checkpoint
from .config import text_part
from .sources.open import open_source

DTypeName = Literal["float32", "bfloat16", "float16", "auto"]
Log = Callable[[str], None]

_DTYPES = {"float32": DType.F32, "bfloat16": DType.BF16, "float16": DType.F16}


def load_model(
    path: Path | str,
    *,
    dtype: DTypeName = "auto",
    max_context: int | None = None,
    step_tokens: int = 2048,
    logit_rows: int = 256,
    allow_remote_code: bool = False,
    log: Log = print,
) -> Program:
    """The captured program of a checkpoint directory or a GGUF file, in phase `captured`.

    `dtype` is what its matrices are held in (`auto`: the checkpoint's own; float16 becomes
    float32): the program computes in float32, from weights rounded to that type, and its spec
    says which. `max_context` is in tokens, by default all that the model allows; `step_tokens` and
    `logit_rows` bound one step. Weights are expressions over published tensors, read when
    asked for. `log` is given one line for each choice that changes results.

    Raises CheckpointError, UnsupportedModelError, ContextError or UsageError.
    """
    source = open_source(Path(path))
    config = source.read_config(allow_remote_code=allow_remote_code, log=log)
    checkpoint = source.open_weights()
    compute = _choose_dtype(dtype, checkpoint, log)
    text = text_part(config)
    if text is not config:
        log(f"{config.model_type} is compiled for text alone: its other inputs are left out")
    checkpoint.check_layers(int(text.num_hidden_layers))
    # It is written last: what can be seen of it is refused now, not after minutes.
    source.check_tokenizer(getattr(text, "vocab_size", None))
    context = _choose_context(text, max_context)
    program = _capture(config, checkpoint, compute, context, log)
    program = replace(
        program,
        symbols={"T": SymbolRange(1, step_tokens), "R": SymbolRange(1, logit_rows)},
        loaders={**program.loaders, **checkpoint.loaders()},
    )
    verify(program)
    check_mixer_per_layer(program)
    check_token_locality(program)
    return program


def _capture(
    config: Any, checkpoint: Checkpoint | None, compute: DType, max_context: int, log: Log
) -> Program:
    from .capture import capture_inline, capture_model
    from .convert import convert_capture
    from .layers import NotRepeatableError
    from .weight_names import WeightNames

    def convert(capture: Any) -> Program:
        if checkpoint is None:
            program = convert_capture(capture, config.model_type, _own_name)
        else:
            names = WeightNames(capture.skeleton, checkpoint, compute)
            program = convert_capture(capture, config.model_type, names.define)
        spec = _spec(config, capture, program, max_context)
        return replace(program, spec=replace(spec, dtype=compute.value))

    dtype = to_torch(DType.F32)  # what the matrices are held in is left to a pass
    try:
        return convert(capture_model(config, dtype, max_context, log))
    except NotRepeatableError as reason:
        log(f"layers are traced one by one: {reason}")
    return convert(capture_inline(config, dtype, max_context, lambda _: None))


def capture_config(
    config: Any, *, dtype: Literal["float32", "bfloat16"], max_context: int, log: Log = print
) -> Program:
    """The captured program of a configuration alone: weights are named as parameters are, and
    nothing can read them. For measuring capture, and models too large to be at hand."""
    return _capture(config, None, _DTYPES[dtype], max_context, log)


def _own_name(name: str, dtype: DType) -> WeightExpr:
    return WeightExpr("checkpoint", (), {"name": name})


def _choose_dtype(name: str, checkpoint: Checkpoint, log: Log) -> DType:
    stored = checkpoint.main_dtype()
    shown = checkpoint.stored_as or stored.value
    if name == "auto":
        if stored in (DType.F32, DType.BF16) and checkpoint.stored_as is None:
            return stored
        log(f"the checkpoint is {shown}: computing in float32, which holds it exactly")
        return DType.F32
    if name not in _DTYPES:
        raise UsageError(f"dtype {name!r} is not known", hint="float32, bfloat16, float16 or auto")
    chosen = _DTYPES[name]
    if chosen is not DType.F32 and stored is not chosen:
        log(f"the checkpoint is {shown}: rounding its matrices to {name} loses precision")
    return chosen


def _choose_context(config: Any, wanted: int | None) -> int:
    limit = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        if limit is None:
            raise UsageError(
                f"{config.model_type} does not specify its maximum context",
                hint="set runtime.max_context",
            )
        return int(limit)
    if wanted < LEAST_CONTEXT:
        raise UsageError(f"max_context is {wanted}, expected at least {LEAST_CONTEXT}")
    longest = None if limit is None else int(limit * _dynamic_factor(config))
    if longest is not None and wanted > longest:
        raise ContextError(
            f"max_context {wanted} is more than the {longest} positions of the model",
            hint=f"set runtime.max_context to {longest} or less",
        )
    return wanted


def _dynamic_factor(config: Any) -> float:
    """By how much `dynamic` rope stretches the positions that a model was trained on; else 1."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or parameters.get("rope_type") != "dynamic":
        return 1.0
    return max(1.0, float(parameters.get("factor", 1.0)))


def _spec(config: Any, capture: Any, program: Program, max_context: int) -> ModelSpec:
    text = text_part(config)
    num_layers = int(text.num_hidden_layers)
    by_layer: dict[int, Node] = {}
    for node in program.nodes:
        if node.op == "attention":
            layer = node.attrs["layer"]
            assert isinstance(layer, int)
            by_layer.setdefault(layer, node)
    if not by_layer:
        raise UnsupportedModelError(
            f"{config.model_type} was captured without attention: it does not use the attention "
            "interface, or has none"
        )
    first = by_layer[min(by_layer)]
    _, heads, head_dim = (dim for dim in first.values()[0].type.shape)
    vocabulary = vocabulary_size(program)
    numbers = (heads, first.values()[1].type.shape[1], head_dim, vocabulary)
    num_heads, num_kv_heads, head_size, vocab_size = (int(str(number)) for number in numbers)
    return ModelSpec(
        architecture=config.model_type,
        num_layers=num_layers,
        hidden_size=int(text.hidden_size),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_size,
        vocab_size=vocab_size,
        max_context=max_context,
        windows=tuple(_window(by_layer.get(layer)) for layer in range(num_layers)),
        num_parameters=_num_parameters(capture.skeleton, whole=text is config),
    )


def _num_parameters(skeleton: Any, *, whole: bool) -> int:
    """Numbers that the model holds; without `whole`, those that text goes through."""
    model, names = skeleton.model, skeleton.parameters
    state = model.state_dict(keep_vars=True)
    kept = set(names.values())
    if not whole:
        used = {id(one) for one in model.get_decoder().state_dict(keep_vars=True).values()}
        head = model.get_output_embeddings()
        used |= {id(one) for one in head.state_dict(keep_vars=True).values()} if head else set()
        kept = {name for name in kept if id(state[name]) in used}
    return sum(state[name].numel() for name in kept)


def _window(node: Node | None) -> int | None:
    window = None if node is None else node.attrs["window"]
    return window if isinstance(window, int) else None
