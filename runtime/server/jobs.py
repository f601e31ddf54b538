"""What one request is to become: prompts, parameters, and how its answer is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..requests.outputs import CompletionOutput, RequestOutput
from .generation import Prompt
from .protocol import GenerationRequest

if TYPE_CHECKING:
    from ..sampling.sampling_params import SamplingParams

SMALL: Final = 2048
"""Values of an answer that are written in no time."""


class Shape(Protocol):
    """How one route writes its choices. `index` numbers the choices over all prompts."""

    prefix: str
    whole_kind: str
    chunk_kind: str
    with_ids: bool
    """Whether each choice has the ids of its tokens."""

    def whole(self, index: int, output: RequestOutput, part: CompletionOutput) -> dict[str, Any]:
        """A choice of a whole answer."""
        ...

    def opening(self, index: int, output: RequestOutput) -> dict[str, Any] | None:
        """What a stream says of a choice before its first tokens, if anything."""
        ...

    def chunk(self, index: int, part: CompletionOutput) -> dict[str, Any] | None:
        """What a step added to a choice; None where that is nothing to tell of."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """One request, checked, and what it is to become."""

    request: GenerationRequest
    prompts: Sequence[Prompt]
    params: SamplingParams
    shape: Shape


def width_of(job: Job) -> int:
    """How many values there may be in an answer for each token."""
    asked = (job.params.logprobs, job.params.prompt_logprobs)
    return 1 + sum(1 + count for count in asked if count is not None)
