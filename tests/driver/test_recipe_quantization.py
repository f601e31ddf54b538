"""What a recipe's `quantization` does to the pipeline: all that it says, or an error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.codegen.registry import get_backend
from infc.driver.optimize import build_recipe_pipeline
from infc.driver.recipe import LoadedRecipe, Recipe, load_recipe
from infc.driver.recipe_quantization import DEFAULT_MAX_KL, SchemeName
from infc.ir.errors import RecipeError, UsageError
from infc.ir.schemes import ADOPTING, AUTO, NONE, SCHEMES
from infc.passes.methods.calibrate_weights import CalibrateWeights
from infc.passes.methods.scale_channels import ScaleChannels
from infc.passes.pipeline import default_pipeline, with_quantization
from infc.passes.quantize_weights import QuantizeWeights


def load(**quantization: Any) -> LoadedRecipe:
    return load_recipe("org/name", {"quantization": quantization})


def pass_of(loaded: LoadedRecipe) -> QuantizeWeights:
    found = [one for one in build_recipe_pipeline(loaded) if isinstance(one, QuantizeWeights)]
    return found[0]


CHOICES = st.sampled_from([NONE, "int8", "q4_0"])
HEADS = CHOICES | st.just(AUTO)


@given(CHOICES, HEADS, HEADS, HEADS, st.lists(CHOICES, max_size=2))
def test_every_scheme_that_is_given_reaches_the_pass(
    scheme: str, head: str, attention: str, embedding: str, schemes: list[str]
) -> None:
    rules = [{"match": f"m{place}", "scheme": one} for place, one in enumerate(schemes)]
    # The section by itself: not every one of these may be loaded.
    given = {"head": head, "attention": attention, "embedding": embedding}
    values = {"scheme": scheme, **given, "rules": rules}
    recipe = Recipe.model_validate({"model": "org/name", "quantization": values})
    loaded = replace(load_recipe("org/name"), recipe=recipe)
    used = bool({scheme, *given.values(), *schemes} - {NONE, AUTO})
    assert recipe.quantization.is_used == used
    made = pass_of(loaded)
    if not used:
        assert made == QuantizeWeights()
        return
    assert (made.scheme, made.embedding) == (scheme, embedding)
    is_four = scheme == "q4_0"
    assert made.head == ("" if head == AUTO and not is_four else head)
    assert made.attention == ("" if attention == AUTO and not is_four else attention)
    assert made.rules == " ".join(f"m{place}={one}" for place, one in enumerate(schemes))


@pytest.mark.parametrize(
    ("scheme", "head", "attention"),
    [
        ("int4", AUTO, AUTO),
        ("int4-token", AUTO, AUTO),
        ("q4_1-weights", AUTO, AUTO),
        ("int8-weights", "", ""),
        ("adopt", "", ""),
    ],
)
def test_what_is_open_beside_4_bits_is_left_to_the_pass(
    scheme: str, head: str, attention: str
) -> None:
    section = load(scheme=scheme).recipe.quantization
    assert (section.head_scheme, section.attention_scheme) == (head, attention)


def test_a_recipe_names_every_scheme() -> None:
    assert {NONE, *ADOPTING, *SCHEMES} == set(get_args(SchemeName))


@pytest.mark.parametrize("key", ["head", "embedding"])
def test_a_head_or_an_embedding_alone_is_quantized(key: str) -> None:
    loaded = load(default="none", **{key: "int8"}, skip=["model.layers.*"])
    made = pass_of(loaded)
    assert loaded.recipe.quantization.is_used
    assert getattr(made, key) == "int8"
    assert (made.scheme, made.skip) == (NONE, "model.layers.*")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("skip", ["*"]),
        ("method", "gptq"),
        ("channel_scaling", "awq"),
        ("calibration", {"tokens": 64}),
        ("head", "none"),
        ("embedding", False),
        ("rules", [{"match": "*", "scheme": "none"}]),
    ],
)
def test_what_cannot_take_effect_is_refused(key: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"quantization.{key} has no effect, .* nothing is quant"):
        load(default="none", **{key: value})


@pytest.mark.parametrize(
    "given", [{"skip": ("*",)}, {"method": "gptq"}, {"channel_scaling": "awq"}]
)
def test_so_it_is_where_the_pipeline_is_built(given: dict[str, Any]) -> None:
    name = next(iter(given))
    with pytest.raises(UsageError, match=f"{name} has no effect, because nothing is quantized"):
        with_quantization(default_pipeline(), scheme=NONE, **given)


@pytest.mark.parametrize("pattern", ["* x", "", "a=b", "a\tb"])
def test_a_pattern_that_is_skipped_is_one_word(pattern: str) -> None:
    with pytest.raises(RecipeError, match=r"quantization\.skip\.0 cannot be"):
        load(scheme="int8", skip=[pattern])


@pytest.mark.parametrize(
    ("written", "overrides"),
    [
        ("quantization: int4", ["quantization.method=gptq"]),
        ("", ["quantization=int4", "quantization.method=gptq"]),
        ("quantization: {default: int4}", ["quantization.method=gptq"]),
    ],
)
def test_a_scheme_alone_stays_beside_other_keys(
    written: str, overrides: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(f"model: here\n{written}\n")
    for settings in (
        overrides,
        {key: value for key, _, value in (o.partition("=") for o in overrides)},
    ):
        section = load_recipe(path, settings).recipe.quantization
        assert (section.scheme, section.method) == ("int4", "gptq")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=x"], "--set model.name=x: model is 'here', which has no keys"),
        (["quantization={default: int4, scheme: int8}"], "default and scheme are one key"),
        (["quantization={default: int4, head: int7}"], "quantization.head cannot be 'int7'"),
        (["quantization={default: int4, head: int7}"], "'auto'"),
        (
            ["quantization={default: int4, head: int8, rules: [{match: lm_head, scheme: int4}]}"],
            "head and a rule for lm_head choose the same scheme",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("model: here\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "calibrates", "must", "bound"),
    [
        ({"scheme": "int4"}, True, False, DEFAULT_MAX_KL),
        ({"scheme": "int8"}, True, False, None),
        ({"scheme": "int8", "rules": [{"match": "*", "scheme": "q4_0"}]}, True, False, 0.25),
        ({"scheme": "int4", "method": "nearest"}, False, False, None),
        ({"scheme": "int4", "method": "gptq"}, True, True, 0.25),
        ({"scheme": "int4", "calibration": {"tokens": 64}}, True, True, 0.25),
        ({"scheme": "adopt"}, False, False, None),
        ({"scheme": "int4", "rules": [{"match": "*", "scheme": "adopt"}]}, True, False, 0.25),
        ({"scheme": "adopt", "method": "gptq"}, True, True, None),
        ({}, False, False, None),
    ],
)
def test_what_is_calibrated_and_bounded_unasked(
    given: dict[str, Any], calibrates: bool, must: bool, bound: float | None
) -> None:
    section = load(**given).recipe.quantization
    assert section.is_calibrated == calibrates
    assert section.default_max_kl == bound
    if calibrates:
        assert section.must_calibrate == must


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({"scheme": "int8"}, AUTO),
        ({"scheme": "int8-token", "method": "gptq"}, AUTO),
        ({"scheme": "int8", "method": "nearest"}, NONE),
        ({"scheme": "int4"}, NONE),
        ({"scheme": "int4", "channel_scaling": "awq"}, "awq"),
        ({"scheme": "int8", "channel_scaling": "none"}, NONE),
        ({}, NONE),
    ],
)
def test_channels_are_scaled_unasked_with_8_bits(given: dict[str, Any], method: str) -> None:
    section = load(**given).recipe.quantization
    assert section.scaling_method == method
    if method == AUTO:
        assert section.is_calibrated


@pytest.mark.parametrize(
    ("quantization", "passes", "methods"),
    [
        ({"scheme": "int8"}, {}, {"scale-channels": AUTO, "calibrate-weights": AUTO}),
        (
            {"scheme": "int8"},
            {"scale-channels": {"method": "smoothquant"}},
            {"scale-channels": "smoothquant", "calibrate-weights": AUTO},
        ),
        (
            {"scheme": "int4"},
            {"scale-channels": {"method": "awq"}},
            {"scale-channels": "awq", "calibrate-weights": AUTO},
        ),
        ({"scheme": "int8"}, {"scale-channels": False}, {"calibrate-weights": AUTO}),
        ({"scheme": "int8"}, {"calibrate-weights": False}, {"scale-channels": AUTO}),
        (
            {"scheme": "int8", "method": "gptq", "channel_scaling": "awq"},
            {},
            {"scale-channels": "awq", "calibrate-weights": "gptq"},
        ),
        ({"scheme": "adopt"}, {}, {"scale-channels": NONE, "calibrate-weights": "nearest"}),
        (
            {"scheme": "adopt", "channel_scaling": "awq"},
            {},
            {"scale-channels": "awq", "calibrate-weights": "nearest"},
        ),
    ],
)
def test_methods_left_open_are_those_of_the_passes(
    quantization: dict[str, Any], passes: dict[str, Any], methods: dict[str, str]
) -> None:
    loaded = load_recipe("org/name", {"quantization": quantization, "passes": passes})
    found = {
        one.name: one
        for one in build_recipe_pipeline(loaded)
        if isinstance(one, ScaleChannels | CalibrateWeights)
    }
    assert {name: one.method for name, one in found.items()} == methods
    scaling = found.get("scale-channels")
    assert not isinstance(scaling, ScaleChannels) or scaling.scheme == quantization["scheme"]


@pytest.mark.parametrize(
    ("scheme", "head", "backend", "auto_head"),
    [
        ("int4", AUTO, "cpp", "int6"),
        ("int4-g64-weights", AUTO, "cpp", "int6-weights"),
        ("int4", AUTO, "reference", "int6"),
        ("int4-token", AUTO, "cpp", ""),
        ("int8", AUTO, "cpp", ""),
        ("int4", "int8", "cpp", ""),
        ("int4", AUTO, "triton", ""),
        ("q4_0", AUTO, "onnx", ""),
    ],
)
def test_an_open_head_has_six_bits_beside_four_where_there_are_kernels(
    scheme: str, head: str, backend: str, auto_head: str
) -> None:
    loaded = load(scheme=scheme, head=head)
    pipeline = build_recipe_pipeline(loaded, can_hold=get_backend(backend).can_hold)
    (found,) = (one for one in pipeline if isinstance(one, QuantizeWeights))
    assert (found.head, found.auto_head) == (pass_of(loaded).head, auto_head)


@pytest.mark.parametrize("key", ["method: gptq", "channel_scaling: awq"])
def test_a_chosen_method_needs_its_pass(key: str) -> None:
    name, value = key.split(": ")
    loaded = load_recipe(
        "org/name",
        {
            "quantization": {"scheme": "int8", name: value},
            "passes": {"scale-channels": False, "calibrate-weights": False},
        },
    )
    with pytest.raises(UsageError, match="the pipeline has no pass"):
        build_recipe_pipeline(loaded)


@pytest.mark.parametrize("option", ["quantization.scheme=int8", "quantization.default=int8"])
@pytest.mark.parametrize("name", ["scheme", "default"])
def test_an_option_replaces_the_scheme_under_either_name(
    name: str, option: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(f"model: here\nquantization: {{{name}: int4, skip: ['*.q_proj']}}\n")
    section = load_recipe(path, [option]).recipe.quantization
    assert (section.scheme, section.skip) == ("int8", ["*.q_proj"])


def test_overrides_are_assignments() -> None:
    pairs: Any = [("quantization", "int4")]
    with pytest.raises(UsageError, match=r"overrides has .*key=value"):
        load_recipe("org/name", pairs)
