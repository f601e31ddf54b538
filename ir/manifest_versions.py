"""Manifests of older versions, as this one says the same."""

from __future__ import annotations

from typing import Any, Final

VERSION: Final = 2
OLDEST: Final = 1
"""The oldest version that is read."""

_OF_THE_PROGRAM: Final = ("limits", "entry", "arena_bytes", "weights")
_STEP_INPUTS: Final = {"input_ids": "i32[T]", "positions": "i32[T]", "logits_index": "i32[R]"}


def to_this_version(data: dict[str, Any], version: int) -> dict[str, Any]:
    """The data of a manifest of that version in the keys of this one.

    What is not as it should be stays so, for the checks of this version to find; so do keys that
    its version did not have.
    """
    return _from_1(data) if version == 1 else data


def _from_1(data: dict[str, Any]) -> dict[str, Any]:
    """Version 1 knew one program, a model's step, and kept what is of it at the top.

    Its inputs and outputs had no names in the manifest: a step's are always the same.
    """
    rest = {
        f"{name} (version 1)" if name == "programs" else name: value for name, value in data.items()
    }
    main: dict[str, Any] = {name: rest.pop(name) for name in _OF_THE_PROGRAM if name in rest}
    kv = rest.pop("kv", None)
    main["resources"] = kv.pop("groups", None) if isinstance(kv, dict) else repr(kv)
    main |= {f"kv.{name}": value for name, value in kv.items()} if isinstance(kv, dict) else {}
    model = rest.get("model")
    vocabulary = model.get("vocab_size") if isinstance(model, dict) else None
    main["inputs"] = dict(_STEP_INPUTS)
    main["outputs"] = {"logits": f"f32[R, {vocabulary}]"}
    if (width := rest.pop("hidden_width", None)) is not None:
        main["outputs"]["hidden"] = f"f32[R, {width!r}]"
    return {**rest, "programs": {"main": main}}
