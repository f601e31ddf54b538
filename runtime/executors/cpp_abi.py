"""The C interface of a generated library, as ctypes; mirrors `codegen/cpp/kernels/abi.hpp`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import ClassVar

from ...ir.errors import ArtifactError

ABI = 9
OLDEST_ABI = 8
"""Libraries of this version are run as well: what is new in later ones lies behind it."""

_Pointer = ctypes.c_void_p


class GroupStep(ctypes.Structure):
    """One KV group's part of a step."""

    _fields_: ClassVar = [
        ("block_table", _Pointer),
        ("slots", _Pointer),
        ("copies", _Pointer),
        ("table_width", ctypes.c_int32),
        ("num_copies", ctypes.c_int32),
    ]


class AdjustmentArrays(ctypes.Structure):
    """What is done to rows of a step before tokens are taken from them."""

    _fields_: ClassVar = [
        ("rows", _Pointer),
        ("bias_ids", _Pointer),
        ("bias", _Pointer),
        ("count_ids", _Pointer),
        ("counts", _Pointer),
        ("masks", _Pointer),
        ("mask_words", ctypes.c_int64),
        ("num_rows", ctypes.c_int32),
    ]


class StepArrays(ctypes.Structure):
    """A step: sizes, and the addresses of its arrays."""

    _fields_: ClassVar = [
        ("num_tokens", ctypes.c_int32),
        ("num_rows", ctypes.c_int32),
        ("num_sequences", ctypes.c_int32),
        ("num_logits", ctypes.c_int32),
        ("num_draws", ctypes.c_int32),
        ("token_ids", _Pointer),
        ("positions", _Pointer),
        ("query_starts", _Pointer),
        ("context_lengths", _Pointer),
        ("logits_index", _Pointer),
        ("groups", ctypes.POINTER(GroupStep)),
        ("hidden", _Pointer),
        ("logits_rows", _Pointer),
        ("draws", _Pointer),
        ("tokens", _Pointer),
        ("adjustments", ctypes.POINTER(AdjustmentArrays)),
        ("logits", _Pointer),
        ("inputs", ctypes.POINTER(_Pointer)),
        ("outputs", ctypes.POINTER(_Pointer)),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
    ]


class Config(ctypes.Structure):
    """What a model is opened with."""

    _fields_: ClassVar = [
        ("abi", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("num_weights", ctypes.c_int64),
        ("weights", ctypes.POINTER(_Pointer)),
        ("num_groups", ctypes.c_int64),
        ("kv", ctypes.POINTER(_Pointer)),
        ("arena", _Pointer),
        ("arena_bytes", ctypes.c_int64),
        ("pin_threads", ctypes.c_int32),
        ("num_profile", ctypes.c_int32),
        ("profile", _Pointer),
    ]


def load_library(path: Path) -> ctypes.CDLL:
    """The library with its functions typed; ArtifactError where it cannot be loaded."""
    try:
        library = ctypes.CDLL(str(path.resolve()), mode=ctypes.RTLD_LOCAL, use_errno=True)
        library.infc_abi.restype = ctypes.c_int32
        if OLDEST_ABI <= library.infc_abi() <= ABI:  # another may have other functions
            _declare(library)
    except (OSError, AttributeError) as error:
        raise ArtifactError(
            f"the generated library cannot be loaded: {error}", where=str(path)
        ) from error
    if not OLDEST_ABI <= library.infc_abi() <= ABI:
        raise ArtifactError(
            f"the generated library has interface version {library.infc_abi()}, "
            f"this infc runs versions {OLDEST_ABI} to {ABI}",
            where=str(path),
            hint="compile the model again",
        )
    return library


def _declare(library: ctypes.CDLL) -> None:
    library.infc_facts.restype = ctypes.c_char_p
    library.infc_num_profile.restype = ctypes.c_int32
    library.infc_open.argtypes = [ctypes.POINTER(Config)]
    library.infc_open.restype = _Pointer
    library.infc_run.argtypes = [_Pointer, ctypes.POINTER(StepArrays)]
    library.infc_run.restype = ctypes.c_int32
    library.infc_close.argtypes = [_Pointer]
    library.infc_close.restype = None
    library.infc_error.restype = ctypes.c_char_p
