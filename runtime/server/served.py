"""What the server needs of an engine, in this process or behind a front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..async_streams import Reader
    from ..engine import EngineStats
    from ..replicas.replica import ReplicaStats
    from ..sampling.sampling_params import SamplingParams
    from ..scheduling.owners import StepTimes


class Drainable(Protocol):
    """What is waited for, and ended, when a server stops."""

    @property
    def num_pending(self) -> int:
        """Requests that were taken and have not ended."""

    def shutdown(self, timeout_seconds: float = 30.0) -> None:
        """Fail what is pending, and end."""


class ServedEngine(Protocol):
    """As `AsyncEngine`, which describes each."""

    @property
    def healthy(self) -> bool:
        """Whether requests are answered."""

    @property
    def num_pending(self) -> int:
        """Requests that were taken and have not ended."""

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its answer may have together."""

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens of a prompt, checked."""

    def stats(self) -> EngineStats:
        """Counts of about now."""

    def replicas(self) -> Sequence[ReplicaStats]:
        """Each engine process; none for an engine in this process."""

    def watch_steps(self, on_step: Callable[[StepTimes], None]) -> None:
        """Tell `on_step` of each step, on another thread."""

    async def read(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | None = None,
        request_ids: Sequence[str] | None = None,
        *,
        whole: bool = False,
    ) -> Reader:
        """Begin a request for each prompt."""

    def abort(self, request_id: str) -> None:
        """End a request soon."""

    def shutdown(self, timeout_seconds: float = 30.0) -> None:
        """Fail what is pending, and end."""
