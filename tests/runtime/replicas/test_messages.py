"""Messages: what is sent is what arrives, and anything else is refused."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir import errors
from infc.ir.errors import ArtifactError, InfcError, RequestError
from infc.runtime.options import RuntimeOptions
from infc.runtime.replicas.frames import FrameError
from infc.runtime.replicas.messages import (
    Abort,
    Add,
    Added,
    Failed,
    Failure,
    FromEngine,
    Logprobs,
    Open,
    Piece,
    Ready,
    Report,
    Stats,
    Times,
    ToEngine,
    Told,
    added_of,
    completion_of,
    error_of,
    failure_of,
    frame_of,
    from_engine,
    metrics_of,
    options_as_data,
    options_from_data,
    params_as_data,
    params_from_data,
    prompt_logprobs_of,
    to_engine,
)
from infc.runtime.requests.outputs import CompletionOutput, RequestMetrics, RequestOutput
from infc.runtime.requests.resumption import ChoiceProgress, Resumption
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.sampling.token_logprobs import TokenLogprobs

COUNT = st.integers(0, 2**63 - 1)
TOKEN = st.integers(0, 2**31 - 1)
TEXT = st.text(max_size=20)
NUMBER = st.floats(allow_nan=False)
MAYBE_TEXT = st.none() | TEXT


def tuples(of: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=4).map(tuple)


LOGPROBS = st.builds(Logprobs, TOKEN, NUMBER, tuples(st.tuples(TOKEN, NUMBER)), COUNT)
PIECE = st.builds(
    Piece,
    COUNT,
    TEXT,
    tuples(TOKEN),
    st.sampled_from([None, "stop", "length", "abort", "error"]),
    st.none() | TEXT | TOKEN,
    st.none() | tuples(LOGPROBS),
    st.none() | NUMBER,
    st.none() | tuples(TOKEN),
)
TIME = st.none() | NUMBER
TIMES = st.builds(Times, NUMBER, TIME, TIME, TIME, TIME, COUNT, COUNT)
SEED = st.integers(0, 2**64 - 1)
ADDED = st.builds(
    Added,
    COUNT,
    tuples(PIECE),
    st.booleans(),
    st.none() | SEED,
    MAYBE_TEXT,
    st.none() | TIMES,
    st.none() | tuples(st.none() | LOGPROBS),
)
FAILURE = st.builds(Failure, TEXT, TEXT, MAYBE_TEXT, MAYBE_TEXT, MAYBE_TEXT)
REPORT = st.builds(
    Report, COUNT, COUNT, COUNT, NUMBER, NUMBER, st.dictionaries(NUMBER, COUNT, max_size=3)
)
STATS = st.builds(Stats, COUNT, COUNT, COUNT, COUNT, COUNT, COUNT, COUNT)
DIGESTS = tuples(st.binary(min_size=16, max_size=16))
TOLD = st.builds(
    Told,
    tuples(ADDED),
    tuples(st.tuples(COUNT, FAILURE)),
    tuples(REPORT),
    st.none() | STATS,
    DIGESTS,
    DIGESTS,
)
PLAIN = st.none() | st.booleans() | COUNT | TEXT
DATA = st.dictionaries(TEXT, PLAIN | st.lists(PLAIN, max_size=3), max_size=4)
OPEN = st.builds(Open, COUNT, TEXT, TEXT, DATA, st.lists(COUNT, max_size=3), st.booleans())
PRIORITY = st.integers(-(2**62), 2**62)
ADD = st.builds(Add, COUNT, tuples(TOKEN), DATA, PRIORITY, TEXT, st.booleans(), st.none() | DATA)
TO_ENGINE = OPEN | ADD | st.builds(Abort, COUNT)
FROM_ENGINE = st.builds(Ready, COUNT, TEXT) | st.builds(Failed, FAILURE) | TOLD


def payload(message: ToEngine | FromEngine) -> bytes:
    return frame_of(message)[4:]


@given(TO_ENGINE)
def test_what_the_front_says_arrives(message: ToEngine) -> None:
    assert to_engine(payload(message)) == message


@given(FROM_ENGINE)
def test_what_an_engine_says_arrives(message: FromEngine) -> None:
    assert from_engine(payload(message)) == message


@given(TO_ENGINE | FROM_ENGINE, st.data())
def test_a_part_of_a_message_is_refused(
    message: ToEngine | FromEngine, data: st.DataObject
) -> None:
    whole = payload(message)
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for read in (to_engine, from_engine):
        with pytest.raises(FrameError):
            read(part)


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_or_a_message(noise: bytes) -> None:
    for read in (to_engine, from_engine):
        try:
            message = read(noise)
        except FrameError:
            continue
        assert frame_of(message)


@pytest.mark.parametrize(
    "wrong",
    [
        ["abort"],
        ["abort", "1"],
        ["abort", 1, 2],
        ["add", 1, ["2"], {}],
        ["unknown", 1],
        {"abort": 1},
        7,
    ],
)
def test_another_shape_is_refused(wrong: object) -> None:
    with pytest.raises(FrameError, match="something else than a message"):
        to_engine(msgspec.msgpack.encode(wrong))


def test_messages_of_the_other_direction_are_refused() -> None:
    with pytest.raises(FrameError):
        to_engine(payload(Told()))
    with pytest.raises(FrameError):
        from_engine(payload(Abort(1)))


@pytest.mark.parametrize("what", ["\ud800", 2**64])
def test_what_cannot_be_sent_is_refused(what: object) -> None:
    with pytest.raises(FrameError, match="cannot be sent"):
        frame_of(Add(1, (1,), {"stop": [what]}))


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0, seed=2**64 - 1, stop="x", max_tokens=3),
    SamplingParams(seed=-(2**63), stop=["é", "y"], n=2, best_of=3, logprobs=0),
    SamplingParams(
        logit_bias={5: -1.5, 3: 100},
        allowed_token_ids=[1, 2, 3, 5],
        banned_token_ids=(2,),
        stop_token_ids=[9],
        ignore_eos=True,
        skip_special_tokens=False,
        prompt_logprobs=3,
        max_tokens=0,
        top_k=4,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.125,
        temperature=1.25,
    ),
    SamplingParams(min_tokens=4),
]


@pytest.mark.parametrize("params", PARAMS)
def test_parameters_arrive(params: SamplingParams) -> None:
    message = to_engine(payload(Add(1, (1,), params_as_data(params))))
    assert isinstance(message, Add)
    assert params_from_data(message.params) == params


def test_every_parameter_is_among_those_that_arrive() -> None:
    """So that a new one is not forgotten."""
    sent = {name for params in PARAMS for name in params_as_data(params)}
    assert sent == {each.name for each in fields(SamplingParams)}


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(RequestError, match="no parameter 'warmth'"):
        params_from_data({"warmth": 1})
    with pytest.raises(RequestError):
        params_from_data({"temperature": "hot"})


def test_options_arrive() -> None:
    options = RuntimeOptions(threads=3, kv_memory="1GiB", weights="mapped", prefix_reuse=False)
    message = to_engine(payload(Open(1, "a", "b", options_as_data(options))))
    assert isinstance(message, Open)
    assert options_from_data(message.options) == options
    with pytest.raises(FrameError):
        options_from_data({"warmth": 1})


def test_resumptions_arrive() -> None:
    ended = ChoiceProgress(token_ids=(1,), finish_reason="stop", stop_reason="x")
    going_on = ChoiceProgress(token_ids=(1, 2), num_characters=3, cumulative_logprob=-0.5)
    resumed = Resumption(seed=2**64 - 1, choices=(ended, going_on))
    message = to_engine(payload(Add(1, (1,), {}, resumed=resumed.as_data())))
    assert isinstance(message, Add)
    assert Resumption.from_data(message.resumed) == resumed


@pytest.mark.parametrize(
    "error",
    [
        RequestError("no", field="stop", where="x", hint="y"),
        ArtifactError("damaged", where="/tmp/x"),
        InfcError("failed"),
    ],
)
def test_errors_arrive(error: InfcError) -> None:
    again = error_of(failure_of(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert getattr(again, "field", None) == getattr(error, "field", None)


@pytest.mark.parametrize("kind", ["Unknown", "annotations", "ParseError", ""])
def test_errors_of_unknown_classes_are_plain(kind: str) -> None:
    assert type(error_of(Failure(kind, "text"))) is InfcError


def test_every_class_of_errors_can_be_made_again() -> None:
    kinds = [each for each in vars(errors).values() if isinstance(each, type)]
    for kind in kinds:
        assert str(error_of(Failure(kind.__name__, "text"))) == "text"


def test_outputs_arrive() -> None:
    entry = TokenLogprobs(3, -1.5, ((3, -1.5), (4, -math.inf)), 1)
    piece = CompletionOutput(
        index=1,
        text="é",
        token_ids=(3,),
        finish_reason="stop",
        stop_reason=7,
        logprobs=(entry,),
        cumulative_logprob=-1.5,
        text_offsets=(0,),
    )
    metrics = RequestMetrics(arrival_time=1.0, first_token_time=2.0, num_cached_tokens=4)
    output = RequestOutput(
        request_id="5",
        prompt_token_ids=(1,),
        outputs=(piece,),
        metrics=metrics,
        finished=True,
        prompt_logprobs=(None, entry),
        error="why",
        seed=2**64 - 1,
    )
    told = from_engine(payload(Told((added_of(5, output, with_times=True),))))
    assert isinstance(told, Told)
    (added,) = told.outputs
    assert tuple(map(completion_of, added.pieces)) == output.outputs
    assert prompt_logprobs_of(added) == output.prompt_logprobs
    assert added.times is not None and metrics_of(added.times) == metrics
    assert (added.number, added.finished, added.seed, added.error) == (5, True, 2**64 - 1, "why")
