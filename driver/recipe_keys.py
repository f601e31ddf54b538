"""What the sections of a recipe are declared with."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict


def key(default: Any, doc: str, *, unit: str | None = None, **limits: Any) -> Any:
    """Declares a key: its default, what it is for, its unit, and what its value may be."""
    extra: JsonDict | None = {"unit": unit} if unit else None
    return Field(default, description=doc, json_schema_extra=extra, **limits)


def _auto_is_none(value: Any) -> Any:
    return None if value == "auto" else value


CountOrAuto = Annotated[int | None, BeforeValidator(_auto_is_none)]
"""A number, or None for `auto`."""


class Section(BaseModel):
    """A mapping with these keys alone, read strictly."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )
