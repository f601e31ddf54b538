"""What the front and its engine processes say to each other, as data; MessagePack, never pickle.

Whoever decodes checks every type. `VERSION` is part of the first message each way, and grows with
every change of a message.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgspec

from ...ir import errors
from ...ir.errors import InfcError, RequestError
from ..log import LogFormat
from ..options import RuntimeOptions
from ..requests.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from ..sampling.sampling_params import SamplingParams
from ..sampling.token_logprobs import TokenLogprobs
from ..scheduling.owners import StepTimes
from .frames import FrameError, framed

VERSION = 3

_Number = int
"""Names a request between front and one engine process; never used twice."""


# --- to an engine ---------------------------------------------------------------------------------


class Open(msgspec.Struct, array_like=True, tag="open", forbid_unknown_fields=True):
    """Open this artifact, which must be the one of this identity; the first message."""

    version: int
    artifact: str
    identity: str
    options: dict[str, Any]
    cpus: list[int] = []
    """Processors to stay on; empty for all."""
    tells_blocks: bool = False
    """Whether changes of the prefix cache are told."""
    log_format: LogFormat = "text"
    """Of what it writes to stderr."""


class Add(msgspec.Struct, array_like=True, tag="add", forbid_unknown_fields=True):
    """Queue a request."""

    number: _Number
    prompt: tuple[int, ...]
    params: dict[str, Any]
    priority: int = 0
    cache_salt: str = ""
    is_whole: bool = False
    """Whether nobody reads its tokens one by one: they are told a few times a second."""
    resumed: dict[str, Any] | None = None


class Abort(msgspec.Struct, array_like=True, tag="abort", forbid_unknown_fields=True):
    """End a request; the answer is its last output, if it has not ended."""

    number: _Number


ToEngine = Open | Add | Abort


# --- from an engine -------------------------------------------------------------------------------


class Failure(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """An error of infc: `kind` is its class."""

    kind: str
    message: str
    field: str | None = None
    where: str | None = None
    hint: str | None = None


class Imported(msgspec.Struct, array_like=True, tag="imported", forbid_unknown_fields=True):
    """The process has imported everything, and waits for `open`; the first message."""


class Opening(msgspec.Struct, array_like=True, tag="opening", forbid_unknown_fields=True):
    """It begins to open the artifact."""


class Ready(msgspec.Struct, array_like=True, tag="ready", forbid_unknown_fields=True):
    """The engine is open and takes requests."""

    version: int
    identity: str


class Failed(msgspec.Struct, array_like=True, tag="failed", forbid_unknown_fields=True):
    """The engine could not be opened, or ends; `is_temporary` where later it may be opened."""

    failure: Failure
    is_temporary: bool = False


class Logprobs(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """As `TokenLogprobs`."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int


class Piece(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """As `CompletionOutput`."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[Logprobs, ...] | None = None
    cumulative_logprob: float | None = None
    text_offsets: tuple[int, ...] | None = None


class Times(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """As `RequestMetrics`. The clock is the same for all processes of a machine."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    last_token_time: float | None
    finished_time: float | None
    num_cached_tokens: int
    num_preemptions: int


class Added(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """As `RequestOutput`, without what the front knows; `times` are left out in the middle."""

    number: _Number
    pieces: tuple[Piece, ...]
    finished: bool = False
    seed: int | None = None
    error: str | None = None
    times: Times | None = None
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None


class Report(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """As `StepTimes`."""

    num_sequences: int
    num_tokens: int
    num_sampled: int
    seconds: float
    executor_seconds: float
    token_gaps: dict[float, int]


class Stats(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """As `EngineStats`; `num_queued` counts requests that wait, and not their choices."""

    num_waiting: int
    num_running: int
    num_free_blocks: int
    num_blocks: int
    num_preemptions: int
    num_steps: int
    num_queued: int


class Told(msgspec.Struct, array_like=True, tag="told", forbid_unknown_fields=True):
    """What has happened since the last time; without anything, that the engine is alive."""

    outputs: tuple[Added, ...] = ()
    refusals: tuple[tuple[_Number, Failure], ...] = ()
    """Requests that ended with an error instead of an output."""
    reports: tuple[Report, ...] = ()
    stats: Stats | None = None
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    """Digests of blocks that are found in the prefix cache now, and that are no longer."""


FromEngine = Imported | Opening | Ready | Failed | Told

_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE = msgspec.msgpack.Decoder(FromEngine)


def frame_of(message: ToEngine | FromEngine) -> bytes:
    """The message as a frame. Raises FrameError for what cannot be sent."""
    return framed(payload_of(message))


def payload_of(message: ToEngine | FromEngine) -> bytes:
    """The message alone, for a carrier that keeps messages apart. Raises FrameError likewise."""
    try:
        return _ENCODER.encode(message)
    except (msgspec.MsgspecError, UnicodeEncodeError, OverflowError, TypeError) as error:
        raise FrameError(f"the message cannot be sent: {error}") from None


def to_engine(payload: bytes) -> ToEngine:
    """What the front says. Raises FrameError for bytes that are no message."""
    try:
        return _TO_ENGINE.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FrameError(f"the front sent something else than a message: {error}") from None


def from_engine(payload: bytes) -> FromEngine:
    """What an engine says. Raises FrameError for bytes that are no message."""
    try:
        return _FROM_ENGINE.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FrameError(f"an engine sent something else than a message: {error}") from None


# --- values of the runtime as data, and back ------------------------------------------------------


def params_as_data(params: SamplingParams) -> dict[str, Any]:
    """The parameters that are not as they are by default."""
    values = {each.name: (getattr(params, each.name), each.default) for each in fields(params)}
    return {name: value for name, (value, default) in values.items() if value != default}


def params_from_data(data: dict[str, Any]) -> SamplingParams:
    """Raises RequestError for what `params_as_data` cannot have given."""
    if unknown := sorted(data.keys() - {each.name for each in fields(SamplingParams)}):
        raise RequestError(f"there is no parameter {unknown[0]!r}", field=unknown[0])
    return SamplingParams(**data)


def options_as_data(options: RuntimeOptions) -> dict[str, Any]:
    """The options by their names."""
    return {each.name: getattr(options, each.name) for each in fields(options)}


def options_from_data(data: dict[str, Any]) -> RuntimeOptions:
    """Raises FrameError for what `options_as_data` cannot have given."""
    if data.keys() - {each.name for each in fields(RuntimeOptions)}:
        raise FrameError("the front sent options that this engine does not have")
    return RuntimeOptions(**data)


def failure_of(error: InfcError) -> Failure:
    """An error as data."""
    field = error.field if isinstance(error, RequestError) else None
    return Failure(type(error).__name__, error.message, field, error.where, error.hint)


def error_of(failure: Failure) -> InfcError:
    """The error again; of a class that is not known here, an InfcError."""
    message, where, hint = failure.message, failure.where, failure.hint
    if failure.kind == RequestError.__name__:
        return RequestError(message, field=failure.field, where=where, hint=hint)
    kind = getattr(errors, failure.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, InfcError)) or kind is errors.ParseError:
        kind = InfcError  # ParseError needs its place, and no engine parses anything
    return kind(message, where=where, hint=hint)


def added_of(number: int, output: RequestOutput, *, with_times: bool) -> Added:
    """An output as data."""
    prompt_logprobs = output.prompt_logprobs
    return Added(
        number,
        tuple([_piece_of(part) for part in output.outputs]),
        output.finished,
        output.seed,
        output.error,
        _times_of(output.metrics) if with_times else None,
        None if prompt_logprobs is None else tuple(map(_logprobs_of, prompt_logprobs)),
    )


def _piece_of(part: CompletionOutput) -> Piece:
    logprobs = None
    if part.logprobs is not None:
        logprobs = tuple([Logprobs(e.token_id, e.logprob, e.top, e.rank) for e in part.logprobs])
    return Piece(
        part.index,
        part.text,
        part.token_ids,
        part.finish_reason,
        part.stop_reason,
        logprobs,
        part.cumulative_logprob,
        part.text_offsets,
    )


def _logprobs_of(entry: TokenLogprobs | None) -> Logprobs | None:
    if entry is None:
        return None
    return Logprobs(entry.token_id, entry.logprob, entry.top, entry.rank)


def _times_of(metrics: RequestMetrics) -> Times:
    return Times(
        metrics.arrival_time,
        metrics.first_scheduled_time,
        metrics.first_token_time,
        metrics.last_token_time,
        metrics.finished_time,
        metrics.num_cached_tokens,
        metrics.num_preemptions,
    )


def metrics_of(times: Times) -> RequestMetrics:
    """Times and counts of a request again."""
    return RequestMetrics(
        arrival_time=times.arrival_time,
        first_scheduled_time=times.first_scheduled_time,
        first_token_time=times.first_token_time,
        last_token_time=times.last_token_time,
        finished_time=times.finished_time,
        num_cached_tokens=times.num_cached_tokens,
        num_preemptions=times.num_preemptions,
    )


def completion_of(piece: Piece) -> CompletionOutput:
    """What was added to a completion again."""
    logprobs = None
    if piece.logprobs is not None:
        logprobs = tuple([_entry_of(each) for each in piece.logprobs])
    return CompletionOutput(
        index=piece.index,
        text=piece.text,
        token_ids=piece.token_ids,
        finish_reason=piece.finish_reason,
        stop_reason=piece.stop_reason,
        logprobs=logprobs,
        cumulative_logprob=piece.cumulative_logprob,
        text_offsets=piece.text_offsets,
    )


def prompt_logprobs_of(added: Added) -> tuple[TokenLogprobs | None, ...] | None:
    """Log-probabilities of a prompt again."""
    if added.prompt_logprobs is None:
        return None
    return tuple([None if each is None else _entry_of(each) for each in added.prompt_logprobs])


def _entry_of(entry: Logprobs) -> TokenLogprobs:
    return TokenLogprobs(entry.token_id, entry.logprob, entry.top, entry.rank)


def report_of(times: StepTimes) -> Report:
    """The times of a step as data."""
    return Report(
        times.num_sequences,
        times.num_tokens,
        times.num_sampled,
        times.seconds,
        times.executor_seconds,
        dict(times.token_gaps),
    )


def step_times_of(report: Report) -> StepTimes:
    """The times of a step again."""
    return StepTimes(
        report.num_sequences,
        report.num_tokens,
        report.num_sampled,
        report.seconds,
        report.executor_seconds,
        report.token_gaps,
    )
