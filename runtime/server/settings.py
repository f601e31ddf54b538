"""What the server may be told: names, keys, limits, times and logs, each declared once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ...ir.errors import UsageError
from ..log import LogFormat
from ..sampling.sampling_params import MAX_CHOICES, MAX_LOGPROBS, RECOMMENDED, recommended_sampling


def _limit(default: Any, doc: str, unit: str, *, low: float = 1, high: float = 2**31 - 1) -> Any:
    """A number that `infc serve` takes as `--its-name`: what for, of what, and its range."""
    return field(default=default, metadata={"doc": doc, "unit": unit, "low": low, "high": high})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How an artifact is served. Raises UsageError for a limit out of its range.

    `model_names` are what clients may call the model, the first of them what answers call it
    where nobody asked. `api_key` is what clients must send as `Authorization: Bearer KEY`; None
    lets everybody in; `open_metrics` lets everybody read `/metrics` without it. `sagemaker` adds
    the two routes that SageMaker calls. `log_requests`
    writes a line as each request ends, `log_prompts` adds what it asked. `default_*` stand for
    what a request leaves out.
    """

    model_names: tuple[str, ...]
    api_key: str | None = field(default=None, repr=False)
    open_metrics: bool = False
    sagemaker: bool = False
    log_requests: bool = False
    log_prompts: bool = False
    log_format: LogFormat = "text"

    max_queue: int = _limit(2048, "Maximum number of waiting requests; others get 429.", "requests")
    max_connections: int = _limit(
        2048, "Maximum number of open connections; others get 503.", "connections"
    )
    max_body_bytes: int = _limit(8 << 20, "Maximum size of a body; larger ones get 413.", "bytes")
    max_header_bytes: int = _limit(
        1 << 16, "Maximum size of the request headers.", "bytes", low=1024
    )
    max_prompts: int = _limit(64, "Maximum prompts per request.", "prompts")
    max_choices: int = _limit(
        MAX_CHOICES, "Maximum completions per request: prompts × n, or × best_of.", "completions"
    )
    max_messages: int = _limit(
        4096, "Maximum messages per chat, and text parts in total.", "messages"
    )
    max_prompt_tokens: int | None = _limit(
        None, "Maximum tokens of a prompt; by default, the context.", "tokens"
    )
    max_output_tokens: int | None = _limit(
        None, "Maximum tokens of a completion; by default, the context.", "tokens"
    )
    max_stop_strings: int = _limit(
        16, "Maximum stop strings per request.", "strings", low=0, high=16
    )
    max_logprobs: int = _limit(
        MAX_LOGPROBS, "Maximum log-probabilities per token.", "entries", low=0,
        high=MAX_LOGPROBS,
    )  # fmt: skip
    max_logprob_entries: int = _limit(
        1 << 20,
        "Maximum log-probabilities per answer: completions × tokens × (1 + `logprobs`), likewise"
        " for prompts.",
        "entries",
    )

    header_seconds: float = _limit(
        20.0, "Timeout for receiving the headers of a request.", "s", low=0.01
    )
    body_seconds: float = _limit(
        60.0, "Timeout for receiving the body of a request; then 408.", "s", low=0.01
    )
    request_seconds: float = _limit(3600.0, "Timeout for a whole answer; then 504.", "s", low=0.01)
    stall_seconds: float = _limit(
        60.0, "Time after which a client that does not read is cut off.", "s", low=0.01
    )
    keep_alive_seconds: float = _limit(30.0, "Timeout for idle connections.", "s", low=0)
    drain_seconds: float = _limit(
        30.0, "Time for running requests to finish at shutdown.", "s", low=0
    )
    hang_seconds: float = _limit(
        60.0,
        "With --replicas, time after which an engine that says nothing is killed. No step may take"
        " so long.",
        "s",
        low=0.5,
    )

    default_temperature: float = 1.0
    default_top_p: float = 1.0
    default_top_k: int = 0
    default_min_p: float = 0.0
    default_repetition_penalty: float = 1.0
    default_logit_bias: tuple[tuple[int, float], ...] = ()
    default_banned_token_ids: tuple[int, ...] = ()
    default_stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise UsageError("a served model needs a name", hint="give --model-name NAME")
        for limit in limits():
            value = getattr(self, limit.name)
            if value is not None and not limit.low <= value <= limit.high:
                raise UsageError(
                    f"{limit.name} is {value}, outside {limit.low:g}..{limit.high:g}",
                    where=limit.flag,
                )

    @property
    def model_name(self) -> str:
        """The first of the names."""
        return self.model_names[0]

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The defaults by the names of `SamplingParams`."""
        names = (*RECOMMENDED, "logit_bias", "banned_token_ids", "stop")
        return {name: getattr(self, f"default_{name}") for name in names}


@dataclass(frozen=True, slots=True)
class Limit:
    """One numeric setting: its range, default and unit, and how the command line calls it."""

    name: str
    default: float | None
    doc: str
    unit: str
    low: float
    high: float

    @property
    def flag(self) -> str:
        """The option of `infc serve`."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_whole(self) -> bool:
        """Whether it counts something; else it is a time."""
        return self.unit != "s"


def limits() -> Iterator[Limit]:
    """Every numeric setting, in the order of their declaration."""
    for one in fields(ServerSettings):
        if one.metadata:
            assert one.default is not MISSING
            yield Limit(one.name, one.default, **one.metadata)


def recommended_defaults(generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `default_*` settings that a checkpoint recommends for sampling, if it does."""
    return {
        f"default_{name}": tuple(value) if isinstance(value, list) else value
        for name, value in recommended_sampling(generation).items()
    }
