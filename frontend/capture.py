"""A model as one exported graph: symbolic tokens, fake weights, equal layers traced once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.errors import InfcError, UnsupportedModelError
from .config import text_part
from .layers import LayerStack, NotRepeatableError, mark_layers
from .quiet import quiet_export
from .sdpa import see_attention
from .skeleton import Skeleton, build_skeleton

# Sizes of the example: different from each other, from 0 and 1, and from common head counts.
_EXAMPLE_TOKENS = 11
_EXAMPLE_ROWS = 7
_MAX_SYMBOL = 1 << 24


@dataclass(frozen=True, slots=True)
class Capture:
    """An exported model and what is needed to read its graph.

    The graph's inputs after parameters and buffers are input_ids `[1, T]`, position_ids
    `[1, T]` and logits_index `[R]`; its outputs are logits `[1, R, V]` and, where the model has
    a head that can be found, what enters it: hidden states `[1, R, H]`.
    """

    exported: torch.export.ExportedProgram
    skeleton: Skeleton
    stack: LayerStack | None


class _Step(torch.nn.Module):
    """The one call that is exported."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,  # [1, T]
        position_ids: torch.Tensor,  # [1, T]
        logits_index: torch.Tensor,  # [R]
    ) -> tuple[torch.Tensor, ...]:
        with see_attention(), _head_inputs(self.model) as hidden:
            out = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=logits_index,
                return_dict=True,
            )
        return (out.logits, *hidden[:1])


@contextlib.contextmanager
def _head_inputs(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """What enters the head while the model runs: one tensor, where there is a head."""
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        yield seen
        return
    handle = head.register_forward_pre_hook(lambda _, args: seen.extend(args[:1]))
    try:
        yield seen
    finally:
        handle.remove()


def capture_model(
    config: Any, dtype: torch.dtype, max_context: int, log: Callable[[str], None]
) -> Capture:
    """Exports the causal model of `config` under fake weights.

    Raises UnsupportedModelError, with one line of the reason, where that does not work.
    """
    try:
        return _capture(config, dtype, max_context, log, repeat=True)
    except NotRepeatableError as reason:
        log(f"layers are traced one by one: {reason}")
    return _capture(config, dtype, max_context, lambda _: None, repeat=False)


def capture_inline(
    config: Any, dtype: torch.dtype, max_context: int, log: Callable[[str], None]
) -> Capture:
    """As `capture_model`, with every layer traced."""
    return _capture(config, dtype, max_context, log, repeat=False)


def _capture(
    config: Any, dtype: torch.dtype, max_context: int, log: Callable[[str], None], *, repeat: bool
) -> Capture:
    skeleton = build_skeleton(config, dtype, max_context, log)
    num_layers = int(text_part(config).num_hidden_layers)
    stack = mark_layers(skeleton.model, num_layers, repeat=repeat)
    tokens = torch.export.Dim("T", min=1, max=_MAX_SYMBOL)
    rows = torch.export.Dim("R", min=1, max=_MAX_SYMBOL)
    with skeleton.mode:
        example = (
            torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int64),
            torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int64),
            torch.zeros(_EXAMPLE_ROWS, dtype=torch.int64),
        )
    try:
        with torch.no_grad(), quiet_export():
            exported = torch.export.export(
                _Step(skeleton.model),
                example,
                dynamic_shapes=({1: tokens}, {1: tokens}, {0: rows}),
                strict=False,
            )
    except Exception as error:
        # Export fails with whatever the model's own code raises: any of it means "refused".
        ours = _find_ours(error)
        if ours is not None:
            raise ours from error
        raise UnsupportedModelError(
            f"{config.model_type} cannot be exported: {_reason(error)}"
        ) from error
    return Capture(exported, skeleton, stack)


def _find_ours(error: BaseException | None) -> Exception | None:
    while error is not None:
        if isinstance(error, (InfcError, NotRepeatableError)):
            return error
        error = error.__cause__ or error.__context__
    return None


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
