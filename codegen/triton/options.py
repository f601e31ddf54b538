"""What a recipe may say about the Triton backend."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TritonOptions:
    """The section `triton` of a recipe."""

    batch_invariant: bool = field(
        default=False,
        metadata={
            "doc": "One form for all steps, so that the bits of a request depend on nothing else"
            " that is computed with it. Decoding then takes longer."
        },
    )
