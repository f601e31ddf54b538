"""Which values a manifest may have: whoever reads them divides, allocates and indexes by them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from .backends import known_backend
from .errors import ProgramError
from .program import HIDDEN, LOGITS, STEP_INPUTS
from .resources import STORED_TYPES, KvGroup, Resource
from .shapes import parse_type
from .types import ELEMENT_TYPES, DType, Sym

if TYPE_CHECKING:
    from .manifest import CompiledProgram, Manifest

_MOST: Final = (1 << 31) - 1  # what a step's arrays index with
_MOST_BYTES: Final = 1 << 48
_MOST_NUMBER: Final = (1 << 63) - 1
_MOST_BLOCK: Final = 1 << 16
_SECTIONS: Final = ("runtime", "kv_cache")
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]*")  # of a program, which has a directory of that name
_SYMBOL: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ROWS: Final = {
    LOGITS: re.compile(r"f32\[[RT], [1-9][0-9]*\]"),
    HIDDEN: re.compile(r"f32\[R, [1-9][0-9]*\]"),
}
_STEP_SYMBOLS: Final = ("T", "R")


def check_values(manifest: Manifest) -> None:
    """ValueError for the first value that no compilation gives: where it is, and what belongs."""
    _check_model(manifest)
    if "main" not in manifest.programs:
        raise ValueError("manifest.programs: there is no 'main'")
    for name, program in manifest.programs.items():
        if not is_program_name(name):
            raise ValueError(f"manifest.programs: {name!r} cannot be the name of a program")
        _check_program(f"programs.{name}", program, manifest)
    main = manifest.main
    if main.vocab_size != manifest.model.vocab_size:
        raise ValueError("manifest.programs.main.outputs: the logits are not of the vocabulary")
    if main.weights.shared:
        raise ValueError("manifest.programs.main.weights.shared: the main program's are its own")
    _check_tokenizer(manifest)
    _check_recipe(manifest.recipe)
    _check_digests(manifest)


def is_program_name(name: str) -> bool:
    """Whether a program may have that name: lower-case letters, digits, hyphens, underscores.

    `captured` and `final` are what stages of each program are called.
    """
    return _NAME.fullmatch(name) is not None and name not in ("captured", "final")


def _check_program(where: str, program: CompiledProgram, manifest: Manifest) -> None:
    _check_entry(f"{where}.entry", program, manifest)
    limits = program.limits
    _within(f"{where}.limits.max_context", limits.max_context, 2)
    for name in ("step_tokens", "max_sequences", "logit_rows"):
        _within(f"{where}.limits.{name}", getattr(limits, name), 1)
    for name, most in limits.sizes.items():
        if name in _STEP_SYMBOLS or not _SYMBOL.fullmatch(name):
            raise ValueError(f"manifest.{where}.limits.sizes: {name!r} is not a further symbol")
        _within(f"{where}.limits.sizes.{name}", most, 1)
    for name, symbol in STEP_INPUTS.items():
        if (text := program.inputs.get(name)) not in (None, f"i32[{symbol}]"):
            raise ValueError(f"manifest.{where}.inputs.{name}: {text!r}, expected i32[{symbol}]")
    for side in ("inputs", "outputs"):
        for name, text in getattr(program, side).items():
            _check_type(f"{where}.{side}.{name}", text, {*_STEP_SYMBOLS, *limits.sizes})
    for name, rows in _ROWS.items():
        text = program.outputs.get(name)
        if text is not None and not rows.fullmatch(text):
            raise ValueError(f"manifest.{where}.outputs.{name}: {text!r}, expected f32[R, width]")
    _unique(f"{where}.resources", [group.name for group in program.resources])
    for index, group in enumerate(program.resources):
        _check_group(f"{where}.resources[{index}]", group)
    _within(f"{where}.arena_bytes", program.arena_bytes, 0, _MOST_BYTES)
    weights = program.weights
    _unique(f"{where}.weights.tensors", weights.tensors)
    _unique(f"{where}.weights.shared", weights.shared)
    for of, tensors in ((where, weights.tensors), ("main", manifest.main.weights.tensors)):
        if strange := sorted(set(weights.shared) - set(tensors)):
            raise ValueError(
                f"manifest.{where}.weights.shared: {strange[0]!r} is not among the tensors of {of}"
            )
    if program.entry.file in manifest.weight_files():
        raise ValueError(f"manifest.{where}.entry.file: it is a file of weights")
    if program.rank is not None:
        _within(f"{where}.rank", program.rank, 0)


def _check_entry(where: str, program: CompiledProgram, manifest: Manifest) -> None:
    """Backends of plug-ins are unknown as long as none is loaded; their executors check as much."""
    kind, backend = program.entry.kind, known_backend(manifest.backend)
    if backend is not None and kind != backend.entry:
        raise ValueError(
            f"manifest.{where}.kind: {kind!r}, but the backend {backend.name} makes"
            f" {backend.entry!r}"
        )


def _check_type(where: str, text: str, symbols: Iterable[str]) -> None:
    try:
        kind = parse_type(text)
    except ProgramError:
        raise ValueError(f"manifest.{where}: {text[:80]!r} is not the type of an array") from None
    if kind.dtype not in (DType.F32, DType.I32):
        raise ValueError(f"manifest.{where}: arrays of {kind.dtype.value} are never handed over")
    for dim in kind.shape:
        if isinstance(dim, Sym) and dim.name not in symbols:
            raise ValueError(f"manifest.{where}: the symbol {dim.name} has no bound")
        for number in (dim.scale, dim.offset) if isinstance(dim, Sym) else (dim,):
            _within(where, number, 0)


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
    _check_dtype(f"{where}.dtype", group.dtype, STORED_TYPES)
    _within(f"{where}: bytes of a block", group.bytes_per_block(), 1, _MOST_BYTES)


def _check_dtype(where: str, name: str, known: Collection[str] = ELEMENT_TYPES) -> None:
    if name not in known:
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
