"""Launches as data: text and back, extents, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.errors import ArtifactError
from infc.ir.launches import (
    SIZES,
    Argument,
    Extent,
    Form,
    Integer,
    Kernel,
    Launch,
    LaunchPlan,
    Pointer,
    Real,
    TensorMap,
    read_launches,
)
from infc.ir.plain_data import encode

NAMES = st.text("abcdefgh_", min_size=1, max_size=8)
EXTENTS = st.builds(
    Extent,
    st.integers(0, 1 << 20),
    st.none() | st.sampled_from(sorted(SIZES)),
    st.integers(-8, 8),
    st.integers(1, 256),
)
POINTERS = st.builds(
    Pointer, st.sampled_from(["arena", "weight", "state", "step", "output"]), NAMES
)
ARGUMENTS: st.SearchStrategy[Argument] = st.one_of(
    POINTERS,
    st.builds(Integer, EXTENTS),
    st.builds(Real, st.floats(width=32, allow_nan=False)),
    st.builds(
        TensorMap,
        POINTERS,
        st.just("bf16"),
        st.tuples(EXTENTS, EXTENTS),
        st.tuples(st.integers(1, 256), st.integers(1, 256)),
        st.sampled_from([0, 32, 64, 128]),
    ),
)
KERNEL = Kernel("step", "code/k.cubin", "code/k.ptx", 128, 1024, 40)


def launches(kernel: str) -> st.SearchStrategy[Launch]:
    """Any launches of that kernel."""
    return st.builds(
        Launch,
        st.just(kernel),
        st.lists(EXTENTS, min_size=1, max_size=3).map(tuple),
        st.lists(ARGUMENTS, max_size=4).map(tuple),
        st.lists(NAMES, max_size=2).map(tuple),
        st.sampled_from(["always", "head", "draws"]),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    )


FORMS = st.builds(
    Form,
    NAMES,
    st.booleans(),
    st.integers(1, 4096),
    st.lists(launches("k"), max_size=3).map(tuple),
    st.integers(1, 64),
)


def plan(*forms: Form, **changes: object) -> LaunchPlan:
    """A plan with one kernel."""
    fields: dict[str, object] = {
        "target": "sm_90",
        "kernels": {"k": KERNEL},
        "forms": forms,
        "arena_bytes": 256,
        "table_width": {"full": 16},
        "buckets": (1, 2, 4),
        "pieces": (16,),
    }
    return LaunchPlan(**{**fields, **changes})  # type: ignore[arg-type]


@given(st.lists(FORMS, max_size=3, unique_by=lambda form: form.name).map(tuple))
def test_text_and_back(forms: tuple[Form, ...]) -> None:
    """A plan is the same after it was written and read."""
    made = plan(*forms)
    assert read_launches(made.to_text(), where="x") == made


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_json_does_not_have(value: float) -> None:
    """They are texts, so that every reader of JSON reads launches."""
    launch = Launch("k", (Extent(1),), (Real(value),))
    text = plan(Form("decode", True, 8, (launch,))).to_text()
    assert f'"value": "{value}"' in text
    json.loads(text, parse_constant=pytest.fail)
    ((found,),) = (one.arguments for one in read_launches(text, where="x").forms[0].launches)
    assert isinstance(found, Real)
    assert repr(found.value) == repr(value)


@given(EXTENTS, st.integers(0, 4096))
def test_extents_round_up(extent: Extent, size: int) -> None:
    """The least multiple of the divisor that covers the size."""
    value = extent.evaluate(dict.fromkeys(SIZES, size))
    whole = extent.scale * (size if extent.size else 1) + extent.offset
    assert value * extent.divisor >= whole > (value - 1) * extent.divisor


def test_the_first_form_that_fits() -> None:
    """A form of one query each is for such steps alone; bounds ascend."""
    made = plan(
        Form("decode-8", True, 8, ()), Form("decode", True, 64, ()), Form("mixed", False, 64, ())
    )
    assert made.form(8, one_query=True).name == "decode-8"
    assert made.form(9, one_query=True).name == "decode"
    assert made.form(8, one_query=False).name == "mixed"
    with pytest.raises(LookupError, match="65 tokens"):
        made.form(65, one_query=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"speed": 1}, "unknown key 'speed'"),
        ({"arena_bytes": "many"}, "arena_bytes"),
        ({"kernels": {}}, "there is no 'k'"),
        ({"arena_bytes": -1}, "arena_bytes"),
        ({"kernels": {"k": encode(replace(KERNEL, threads=2048))}}, "2048 threads"),
        ({"kernels": {"k": encode(replace(KERNEL, shared_bytes=-1))}}, "-1 shared bytes"),
        ({"buckets": [4, 2]}, "buckets"),
        ({"pieces": [0]}, "pieces"),
    ],
)
def test_what_is_refused(change: dict[str, object], message: str) -> None:
    """Another version, keys nobody knows, other types, and references to nothing."""
    launch = Launch("k", (Extent(1),), ())
    data = json.loads(plan(Form("mixed", False, 8, (launch,))).to_text())
    with pytest.raises(ArtifactError, match=message):
        read_launches(json.dumps({**data, **change}), where="x")


MATRIX = TensorMap(Pointer("arena", ""), "bf16", (Extent(8), Extent(64)), (8, 64))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (Pointer("arena", "", 257), "the offset 257 is outside the arena of 256 bytes"),
        (Pointer("arena", "", -8), "the offset -8"),
        (Pointer("weight", "w", 1 << 60), "the offset"),
        (Integer(Extent(1, "T", 0, 0)), "a divisor below 1"),
        (Real(1e300), "no float32"),
        (replace(MATRIX, base=Pointer("arena", "", 999)), "outside the arena"),
        (replace(MATRIX, shape=(Extent(1, "T", 0, 0), Extent(64))), "a divisor below 1"),
        (replace(MATRIX, dtype="q9"), "no element type 'q9'"),
        (replace(MATRIX, box=(0, 64)), "a box"),
        (replace(MATRIX, box=(8,)), "a box"),
        (replace(MATRIX, swizzle_bytes=7), "a swizzle of 7 bytes"),
    ],
)
def test_arguments_that_no_kernel_can_be_given_are_refused(
    argument: Argument, message: str
) -> None:
    launch = Launch("k", (Extent(1),), (argument,))
    text = plan(Form("mixed", False, 8, (launch,))).to_text()
    with pytest.raises(ArtifactError, match=message):
        read_launches(text, where="x")


def test_two_forms_of_one_name_are_refused() -> None:
    form = Form("mixed", False, 8, ())
    with pytest.raises(ArtifactError, match="two are named 'mixed'"):
        read_launches(plan(form, form).to_text(), where="x")


def test_text_that_is_none() -> None:
    """What is no JSON, or no mapping."""
    for text in ("", "[]", "{", "null", "[" * 100_000):
        with pytest.raises(ArtifactError):
            read_launches(text, where="x")
