"""Parameter names -> expressions over published tensor names, by the library's own mapping."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..ir.errors import CheckpointError, ProgramError
from ..ir.program import WeightExpr
from ..ir.types import DType
from ..ir.weights import infer_weight
from .checkpoint import Checkpoint
from .skeleton import Skeleton
from .weight_conversion import apply_conversion

_NAMES_SHOWN = 3


class WeightNames:
    """How each parameter of a model is made from a checkpoint.

    Built once per checkpoint. Numbers of matrices are those that element type `held` has. Raises
    CheckpointError for tensors that are missing, unexpected, given twice or of another shape than
    the configuration needs.
    """

    def __init__(self, skeleton: Skeleton, checkpoint: Checkpoint, held: DType) -> None:
        self._held = held
        self._checkpoint = checkpoint
        self._model = skeleton.model
        self._parameters = skeleton.parameters
        self._state = skeleton.model.state_dict()
        exprs, unexpected = self._map_names()
        self._check_unexpected(unexpected)
        self._exprs = self._merge_tied(exprs)
        self._check_missing()
        for name, expr in self._exprs.items():
            self._check_shape(name, expr)

    def define(self, name: str, dtype: DType) -> WeightExpr:
        """The expression of a parameter (by its canonical name) in element type `dtype`."""
        expr = self._exprs[name]
        kind = infer_weight(expr)
        if self._held is not DType.F32 and kind is not None and kind.rank > 1:
            expr = _cast(expr, self._held)
        return _cast(expr, dtype)

    def _map_names(self) -> tuple[dict[str, WeightExpr], list[str]]:
        """Expressions by parameter name, and the published names that lead nowhere."""
        mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        exprs: dict[str, WeightExpr] = {}
        collected: dict[str, dict[str, list[WeightExpr]]] = {}
        unexpected: list[str] = []
        published = self._checkpoint.published()
        for name in sorted(published, key=dot_natural_key):
            target, pattern = self._rename(name, renamings, converters)
            leaf = published[name]
            if target not in self._state:
                unexpected += self._published(leaf)
            elif pattern is not None:
                collected.setdefault(target, {}).setdefault(pattern, []).append(leaf)
            elif target in exprs:
                raise CheckpointError(
                    f"is parameter {target}, which another tensor is already",
                    where=self._checkpoint.where(self._published(leaf)[0]),
                )
            else:
                exprs[target] = leaf
        for target, parts in collected.items():
            converter = by_pattern[next(iter(parts))]
            made = apply_conversion(converter, target, parts, self._shape_of)
            exprs.update(made)
        return exprs, unexpected

    def _rename(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, Any]:
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, self._state)
        if target not in self._state and name in self._state:
            target, pattern = rename_source_key(name, [], [], prefix, self._state)
        return target, pattern

    def _shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def _check_unexpected(self, names: list[str]) -> None:
        patterns = set(self._model._keys_to_ignore_on_load_unexpected or ())
        # Buffers that the library computes now, and that older files hold.
        patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
        left = _unmatched(names, patterns)
        if left:
            raise CheckpointError(
                f"{_count(left, 'tensor')} the model does not have: {_show(left)}",
                where=str(self._checkpoint.path),
                hint=f"the weights are not those of {self._checkpoint.described_by}",
            )

    def _merge_tied(self, exprs: Mapping[str, WeightExpr]) -> dict[str, WeightExpr]:
        """Expressions by canonical name; tied tensors that are published twice must be equal."""
        merged: dict[str, WeightExpr] = {}
        first: dict[str, str] = {}
        for name, expr in exprs.items():
            canonical = self._parameters[name]
            other = merged.setdefault(canonical, expr)
            known = first.setdefault(canonical, name)
            if other != expr and not self._same_bytes(other, expr):
                raise CheckpointError(
                    f"{known} and {name} differ, but config.json ties them",
                    where=str(self._checkpoint.path),
                    hint="set tie_word_embeddings to false in config.json",
                )
        return merged

    def _same_bytes(self, left: WeightExpr, right: WeightExpr) -> bool:
        if left.op != "checkpoint" or right.op != "checkpoint":
            return False
        a, b = (self._checkpoint.tensor(str(expr.attrs["name"])) for expr in (left, right))
        return a.dtype == b.dtype and torch.equal(a, b)

    def _check_missing(self) -> None:
        wanted = set(self._parameters.values())
        missing = sorted(wanted - self._exprs.keys(), key=dot_natural_key)
        left = _unmatched(missing, self._model._keys_to_ignore_on_load_missing or ())
        if left:
            raise CheckpointError(
                f"{_count(left, 'parameter')} without a tensor: {_show(left)}",
                where=str(self._checkpoint.path),
            )

    def _check_shape(self, name: str, expr: WeightExpr) -> None:
        needed = self._shape_of(name)
        try:
            kind = infer_weight(expr)
        except ProgramError as error:
            raise CheckpointError(f"parameter {name}: {error.message}") from error
        if kind is None or kind.shape != needed:
            names = self._published(expr)
            raise CheckpointError(
                f"parameter {name} is {kind}, {self._checkpoint.described_by} needs shape"
                f" {list(needed)}",
                where=self._checkpoint.where(names[0]),
            )
        if not kind.dtype.is_float:
            raise CheckpointError(
                f"has element type {kind.dtype.value}, expected floating point",
                where=self._checkpoint.where(self._published(expr)[0]),
            )

    def _published(self, expr: WeightExpr) -> list[str]:
        if expr.op == "checkpoint":
            return [str(expr.attrs["name"])]
        return [name for part in expr.inputs for name in self._published(part)]


def _cast(expr: WeightExpr, dtype: DType) -> WeightExpr:
    kind = infer_weight(expr)
    if kind is not None and kind.dtype is dtype:
        return expr
    return WeightExpr("cast", (expr,), {"dtype": dtype.value})


def _unmatched(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    compiled = [re.compile(pattern) for pattern in patterns]
    return [name for name in names if not any(pattern.search(name) for pattern in compiled)]


def _show(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown}, ..."


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"
