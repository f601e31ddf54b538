"""Which values a manifest may have: whoever reads them divides, allocates and indexes by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from .backends import known_backend
from .resources import KvGroup, Resource
from .types import DType

if TYPE_CHECKING:
    from .manifest import Manifest

_MOST: Final = (1 << 31) - 1  # what a step's arrays index with
_MOST_BYTES: Final = 1 << 48
_MOST_NUMBER: Final = (1 << 63) - 1
_MOST_BLOCK: Final = 1 << 16
_SECTIONS: Final = ("runtime", "kv_cache")


def check_values(manifest: Manifest) -> None:
    """ValueError for the first value that no compilation gives: where it is, and what belongs."""
    _check_entry(manifest)
    _check_model(manifest)
    limits = manifest.limits
    _within("limits.max_context", limits.max_context, 2)
    for name in ("step_tokens", "max_sequences", "logit_rows"):
        _within(f"limits.{name}", getattr(limits, name), 1)
    _unique("kv.groups", [group.name for group in manifest.kv.groups])
    for index, group in enumerate(manifest.kv.groups):
        _check_group(f"kv.groups[{index}]", group)
    _within("arena_bytes", manifest.arena_bytes, 0, _MOST_BYTES)
    if manifest.hidden_width is not None:
        _within("hidden_width", manifest.hidden_width, 1)
    _unique("weights.tensors", manifest.weights.tensors)
    _check_tokenizer(manifest)
    _check_recipe(manifest.recipe)
    _check_digests(manifest)


def _check_entry(manifest: Manifest) -> None:
    """Backends of plug-ins are unknown as long as none is loaded; their executors check as much."""
    kind, backend = manifest.entry.kind, known_backend(manifest.backend)
    if backend is not None and kind != backend.entry:
        raise ValueError(
            f"manifest.entry.kind: {kind!r}, but the backend {backend.name} makes {backend.entry!r}"
        )


def _check_model(manifest: Manifest) -> None:
    model = manifest.model
    _within("model.vocab_size", model.vocab_size, 1)
    for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim"):
        _within(f"model.{name}", getattr(model, name), 0)
    _within("model.max_context", model.max_context, 0)
    _within("model.num_parameters", model.num_parameters, 0, _MOST_BYTES)
    _check_windows("model.windows", model.windows)
    if model.dtype is not None:
        _check_dtype("model.dtype", model.dtype)


def _check_group(where: str, group: Resource) -> None:
    if not group.layers:
        raise ValueError(f"manifest.{where}.layers: no layer")
    _unique(f"{where}.layers", group.layers)
    for layer in group.layers:
        _within(f"{where}.layers", layer, 0)
    for name in group.sizes:
        _within(f"{where}.{name}", getattr(group, name), 1)
    _within(f"{where}.block_size", group.block_size, 1, _MOST_BLOCK)
    if isinstance(group, KvGroup):
        _check_windows(f"{where}.window", (group.window,))
    _check_dtype(f"{where}.dtype", group.dtype)
    _within(f"{where}: bytes of a block", group.bytes_per_block(), 1, _MOST_BYTES)


def _check_dtype(where: str, name: str) -> None:
    if name not in {kind.value for kind in DType}:
        raise ValueError(f"manifest.{where}: {name!r} is not an element type")


def _check_tokenizer(manifest: Manifest) -> None:
    tokenizer = manifest.tokenizer
    if tokenizer is None:
        return
    for token in (*tokenizer.eos, *([] if tokenizer.bos is None else [tokenizer.bos])):
        _within("tokenizer: the id of a token", token, 0)
    _check_numbers("tokenizer.generation", tokenizer.generation)


def _check_recipe(recipe: Mapping[str, Any]) -> None:
    _check_numbers("recipe", recipe)
    for name in _SECTIONS:
        if not isinstance(recipe.get(name) or {}, dict):
            raise ValueError(f"manifest.recipe.{name}: {recipe[name]!r}, expected a mapping")


def _check_numbers(where: str, value: object) -> None:
    """Of what is not typed: no number beyond 64 bits, at any depth that JSON was read with."""
    if isinstance(value, int):
        _within(where, value, -_MOST_NUMBER, _MOST_NUMBER)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_numbers(f"{where}.{key}", item)
    elif isinstance(value, list):
        for item in value:
            _check_numbers(where, item)


def _check_digests(manifest: Manifest) -> None:
    for name, digest in manifest.files.items():
        _within(f"files: bytes of {name!r}", digest.bytes, 0, _MOST_BYTES)


def _check_windows(where: str, windows: Iterable[int | None]) -> None:
    for window in windows:
        if window is not None:
            _within(where, window, 1)


def _within(where: str, value: int, least: int, most: int = _MOST) -> None:
    if not least <= value <= most:
        raise ValueError(f"manifest.{where}: {_shown(value)} is outside {least}..{most}")


def _shown(value: int) -> str:
    return str(value) if abs(value) < 10**20 else "a number of more than twenty digits"


def _unique(where: str, values: Iterable[object]) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"manifest.{where}: {value!r} occurs twice")
        seen.add(value)
