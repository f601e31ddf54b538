"""Certificates: what they say, that they are reproduced, and that bounds stop a compilation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import infc
from infc.driver import calibration, certificate, evidence, recipe_quantization
from infc.driver.certificate import LEAST_TOKENS, check_bounds
from infc.driver.cli import run
from infc.driver.evaluate import compare_on_text
from infc.driver.evidence import EMBEDDINGS, HEAD, Evidence, Figures, StageEvidence
from infc.driver.recipe import AccuracySection
from infc.driver.source_model import open_source
from infc.driver.tally import Tally
from infc.driver.texts import EVALUATION, read_text
from infc.ir.artifact import Artifact
from infc.ir.errors import CapacityError, InfcError, PassError, TargetError
from infc.runtime.server.certificate import read_certificate

from ..checkpoints import make_checkpoint
from ..test_layout import ROOT
from .compiling import Lines, contents

TINY = ROOT / "recipes/tiny"
Build = Callable[..., Artifact]
INT4, INT8 = (f"quantization={{scheme: {name}, method: nearest}}" for name in ("int4", "int8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of the bundled model beside a short text, and a pass that ruins a layer."""
    place = tmp_path_factory.mktemp("certified")
    document = read_text(EVALUATION).documents[1]
    assert document.text is not None
    (place / "short.txt").write_text(document.text[:600])
    (place / "other.txt").write_text(document.text[600:1200])
    (place / "ruin.py").write_text(RUIN)
    (place / "model.yaml").write_text(RECIPE.format(model=TINY / "checkpoint"))
    return place


RECIPE = """
model: {model}
backend: reference
dtype: float32
accuracy: {{evaluation: short.txt}}
runtime: {{max_context: 256}}
"""

RUIN = '''
from dataclasses import dataclass, replace
from typing import ClassVar

from infc.ir.program import WeightRef
from infc.passes.base import Pass, PassResult


@dataclass(frozen=True)
class RuinLayer(Pass):
    """Gives a layer the projection of the layer below."""

    layer: int = 3

    name: ClassVar[str] = "ruin-layer"
    phase: ClassVar[str] = "quantize"
    contract: ClassVar[str] = "lossy"
    tolerance: ClassVar[float] = 1e9

    def run(self, program, context):
        def projection(layer):
            wanted = f"layers.{layer}.mlp.down_proj"
            return next(
                node for node in program.nodes
                if wanted in (node.source or "") and len(node.weights()) >= 1
                and "linear" in node.op
            )

        mine, other = projection(self.layer), projection(self.layer - 1)
        plain = [x for x in mine.inputs if not isinstance(x, WeightRef)]
        ruined = replace(mine, inputs=(*plain, *other.weights()))
        nodes = tuple(ruined if node is mine else node for node in program.nodes)
        return PassResult(replace(program, nodes=nodes), 1)
'''


@pytest.fixture(scope="module")
def build(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    def make(*overrides: str, **options: Any) -> Artifact:
        output = tmp_path_factory.mktemp("build") / "tiny.infc"
        return infc.compile(
            place / "model.yaml", output, overrides=overrides, cache=False, **options
        )

    return make


def certificate_of(artifact: Artifact) -> dict[str, Any]:
    found = read_certificate(artifact)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def int4(build: Build) -> Artifact:
    return build(INT4)


def test_it_says_what_was_measured_on_what(int4: Artifact, place: Path) -> None:
    found = certificate_of(int4)
    text = read_text("short.txt", place)
    assert found["evaluation"]["name"] == "short.txt"
    assert found["evaluation"]["sha256"] == text.sha256
    assert found["checkpoint"] == int4.manifest.checkpoint
    assert found["what"] == "the whole model"
    (stage,) = found["passes"]
    assert stage["pass"] == "quantize-weights"
    places = [one["place"] for one in stage["errors"]]
    assert places == [EMBEDDINGS, *(f"layer {layer}" for layer in range(6)), HEAD]
    assert all(0.001 < one["error"] < 0.5 for one in stage["errors"])
    assert found["figures"]["tokens"] == found["evaluation"]["tokens"] - 1


def test_embeddings_are_compared_in_narrow_types_too(build: Build) -> None:
    (stage,) = certificate_of(build("dtype=bfloat16", INT4))["passes"]
    assert stage["errors"][0]["place"] == EMBEDDINGS
    assert 0.001 < stage["errors"][0]["error"] < 0.03


def test_its_figures_are_those_of_an_evaluation(int4: Artifact, place: Path) -> None:
    """Of the reference, which computes what the program says."""
    figures = certificate_of(int4)["figures"]
    text = (place / "short.txt").read_text()
    compared = compare_on_text(int4, open_source(int4, TINY / "checkpoint"), text)
    assert figures["kl_mean"] == pytest.approx(compared.divergence.kl_mean, rel=0.02)
    assert figures["source_perplexity"] == pytest.approx(compared.theirs.perplexity, rel=0.02)
    assert figures["perplexity"] == pytest.approx(compared.mine.perplexity, rel=0.02)


def test_it_says_in_what_formats_weights_are(int4: Artifact) -> None:
    found = certificate_of(int4)
    formats = {(one["class"], one["format"]): one for one in found["formats"]}
    assert 4.25 < formats["layers", "int4"]["bits_per_weight"] < 4.6
    # The head is the same matrix, which is counted and stored once.
    assert formats["embeddings and head", "int6"]["weights"] == 4096 * 256
    assert {place for place, _ in formats} == {"embeddings and head", "layers", "other"}
    assert found["bits_per_weight"] == pytest.approx(5.38, abs=0.05)  # queries have 4 bits
    weights = sum(one["bytes"] for one in found["formats"])
    assert 0 < int4.manifest.files["weights.safetensors"].bytes - weights < 1 << 16


def test_a_second_compilation_gives_the_same_bytes(int4: Artifact, build: Build) -> None:
    again = build(INT4)
    assert contents(again.path) == contents(int4.path)


def test_a_calibrated_compilation_is_reproduced_by_the_compiled_backend(
    build: Build, place: Path
) -> None:
    """Certificate and weights alike: no cache, two directories, what was run in parallel."""
    calibration = f"calibration: {{text: '{place / 'other.txt'}', tokens: 128}}"
    options = f"quantization={{scheme: int4, method: gptq, {calibration}}}"
    first, second = (build("backend=cpp", "target=native", options) for _ in range(2))
    found = certificate_of(first)
    assert found["measured"] == "the artifact"
    assert [one["pass"] for one in found["passes"]] == ["quantize-weights", "calibrate-weights"]
    assert found == certificate_of(second)
    assert contents(first.path) == contents(second.path)


@pytest.mark.parametrize("layer", [1, 4])
def test_a_ruined_layer_stops_the_compilation_and_is_named(
    layer: int, build: Build, place: Path, tmp_path: Path
) -> None:
    """The pass that ruined it too, and not the one before it."""
    ruin = f"passes={{ruin:RuinLayer: {{layer: {layer}}}}}"
    with pytest.raises(PassError) as caught:
        build(INT8, ruin, "accuracy.max_kl=0.02")
    said = str(caught.value)
    assert said.startswith("ruin-layer: a KL divergence of ")
    assert "exceeds accuracy.max_kl: 0.02, measured on the whole model over" in said
    assert f"the error begins in layer {layer}, where it grows most" in said


def test_embeddings_are_named_where_they_are_what_loses(build: Build) -> None:
    """And not the layer that reads them."""
    with pytest.raises(PassError) as caught:
        build("quantization={embedding: int4, method: nearest}", "accuracy.max_kl=0.00001")
    assert f"the error begins in {EMBEDDINGS}, where it grows most (from 0.0 to" in str(
        caught.value
    )


def test_a_broken_bound_leaves_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "tiny.infc"
    options = ["--set", "quantization=int4-token"]
    options += ["--set", "accuracy.max_kl=1e-6"]
    command = ["compile", str(place / "model.yaml"), "-o", str(output), *options, "-q"]
    assert run([*command, "--no-verify"]) == 4  # a bound holds without verification too
    error = capsys.readouterr().err
    assert error.startswith("error: quantize-weights: a KL divergence of ")
    assert error.count("\n") == 1
    assert list(output.parent.glob("*.infc")) == []


def test_bounds_that_are_kept_are_recorded(build: Build) -> None:
    found = certificate_of(build(INT8, "accuracy.max_kl=0.5"))
    assert found["bounds"] == {"max_kl": 0.5}
    assert found["figures"]["kl_mean"] <= 0.5


def test_a_bound_without_a_lossy_pass_is_kept_or_names_the_types(build: Build) -> None:
    found = certificate_of(build("accuracy.max_kl=1e-6"))
    assert found["measured"] == "the artifact"
    assert found["passes"] == []
    with pytest.raises(
        PassError, match=r"the artifact: a KL .*; no pass is lossy: .* .accept more, or use d"
    ):
        build("dtype=bfloat16", "accuracy.max_kl=1e-9")


def test_the_engine_of_the_backend_is_measured(build: Build, place: Path) -> None:
    found = certificate_of(build("backend=cpp", "target=native", INT8, "kv_cache.dtype=int8"))
    assert found["measured"] == "the artifact"
    program, engine = found["passes"][0]["kl_mean"], found["figures"]["kl_mean"]
    assert 0 < program < engine < 0.05  # the cache in int8 comes on top


def test_where_it_cannot_run_the_program_is_measured(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(features: object) -> None:
        raise TargetError("it lacks a feature")

    monkeypatch.setattr(certificate, "check_target", refuse)
    found = certificate_of(build("backend=cpp", "target=x86-64-v2", INT8))
    assert found["measured"] == "the program"
    assert found["reason"] == "it was compiled for another processor: it lacks a feature"
    assert found["figures"]["kl_mean"] == found["passes"][0]["kl_mean"]


def test_a_large_model_is_measured_on_a_few_layers(
    build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evidence, "MAX_RUN_FLOPS", 1_000_000_000)
    found = certificate_of(build(INT8))
    assert found["what"] == "layers 0, 1, 5 of 6 and the head"
    assert found["measured"] == "the program"
    places = [one["place"] for one in found["passes"][0]["errors"]]
    assert places == [EMBEDDINGS, "layer 0", "layer 1", "layer 5", HEAD]
    lines = Lines()
    artifact = build(INT8, "accuracy.max_kl=1", progress=lines)
    assert any("bounds were checked on layers 0, 1, 5 of 6 and" in line for line in lines.lines)
    assert run(["inspect", str(artifact.path)]) == 0
    assert "max_kl 1, kept by the program (layers 0, 1, 5 of 6" in " ".join(
        capsys.readouterr().out.split()
    )
    monkeypatch.setattr(evidence, "MAX_RUN_FLOPS", 1_000)
    found = certificate_of(build(INT8))
    assert found["figures"] is None
    assert found["reason"] == "a run of layers 0, 1, 5 of 6 and the head takes too long"
    with pytest.raises(PassError, match="the accuracy cannot be measured: a run of"):
        build(INT8, "accuracy.max_kl=1")


def test_what_is_not_measured_is_said(build: Build) -> None:
    found = certificate_of(build())
    assert found["figures"] is None and found["reason"] == "nothing was quantized"
    found = certificate_of(build(INT8, verify=False))
    assert found["reason"] == "verification was switched off"


def test_a_model_without_a_tokenizer_has_no_figures(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "checkpoint", num_hidden_layers=2)
    (tmp_path / "model.yaml").write_text("model: ./checkpoint\nbackend: reference\n")
    options = {"quantization": "int4"}
    lines = Lines()
    made = infc.compile(
        tmp_path / "model.yaml", tmp_path / "out", overrides=options, cache=False, progress=lines
    )
    reason = "the checkpoint has no tokenizer"
    found = certificate_of(made)
    assert found["reason"] == reason
    assert found["bounds"] == {} and found["unchecked"] == {"max_kl": 0.25, "reason": reason}
    assert f"the bound of 0.25 for 4 bits was not checked: {reason}" in lines.lines
    assert any("37 random tokens" in line for line in lines.lines)  # instead
    with pytest.raises(PassError, match="cannot be measured: the checkpoint has no tokenizer"):
        infc.compile(
            tmp_path / "model.yaml",
            tmp_path / "out",
            overrides={**options, "accuracy.max_kl": 1},
            cache=False,
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["accuracy.max_kl=0"], "accuracy.max_kl cannot be 0"),
        (["accuracy.max_kl=-1"], "accuracy.max_kl cannot be -1"),
        (["accuracy.max_kl=.nan"], "accuracy.max_kl cannot be nan"),
        (["accuracy.max_kl=little"], "accuracy.max_kl cannot be 'little'"),
        (["accuracy.max_perplexity_increase=.inf"], "accuracy.max_perplexity_increase cannot be"),
        (["accuracy.max_kl_mean=1"], "did you mean 'accuracy.max_kl'?"),
        (["accuracy.evaluation=gone.txt"], "accuracy.evaluation: "),
        (["accuracy.evaluation=ruin.py/x"], "cannot be read: Not a directory"),
    ],
)
def test_bad_recipes_are_refused(
    overrides: list[str],
    message: str,
    build: Build,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)  # where the paths of options begin
    with pytest.raises(InfcError) as caught:
        build(INT8, *overrides)
    assert message in str(caught.value)


def test_a_text_that_is_too_short_for_a_bound_is_refused(
    build: Build, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is captured, which may take minutes."""
    (tmp_path / "few.txt").write_text("only a few words")
    few = f"accuracy.evaluation={tmp_path / 'few.txt'}"
    with monkeypatch.context() as patch:
        patch.delattr("infc.driver.compile._capture")
        with pytest.raises(InfcError, match=f"few.txt: too little text: .* least {LEAST_TOKENS}"):
            build(INT8, few, "accuracy.max_kl=1")
    found = certificate_of(build(INT8, few))
    assert "too little text" in found["reason"]


def test_inspect_prints_it(int4: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(int4.path)]) == 0
    printed = capsys.readouterr().out
    shown = printed[printed.index("\ncertificate\n") :]
    figures = certificate_of(int4)["figures"]
    assert f"KL {figures['kl_mean']}" in shown
    assert "short.txt" in shown and "error by layer" in shown
    assert "random tokens" not in printed
    assert run(["inspect", str(int4.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certificate"] == certificate_of(int4)


def _stage(errors: list[float], kl: float = 1.0) -> StageEvidence:
    places = [*(f"layer {i}" for i in range(len(errors) - 1)), HEAD]
    figures = Figures(kl, kl, 0.5, 3.0, 2.0, 10)
    return StageEvidence(0, "some-pass", figures, tuple(zip(places, errors, strict=True)))


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12))
def test_the_origin_is_where_the_error_grows_most(errors: list[float]) -> None:
    stage = _stage(errors)
    grown = [now - before for before, now in zip([0.0, *errors], errors, strict=False)]
    places = [place for place, _ in stage.errors]
    assert grown[places.index(str(stage.origin()))] == max(grown)


@pytest.mark.parametrize(
    ("distances", "named"), [((3.0, 0.5, 2.0), "c"), ((3.0, 2.0), "a"), ((0.5, 2.0), "b")]
)
def test_a_pass_that_a_later_one_mends_is_not_named(
    distances: tuple[float, ...], named: str
) -> None:
    """Rounding to nearest may be beyond a bound that calibrated codes keep."""
    stages = tuple(
        replace(_stage([0.1], kl=kl), name=name) for name, kl in zip("abc", distances, strict=False)
    )
    found = Evidence("the whole model", 10, stages, replace(stages[-1].figures, kl_mean=2.0))
    with pytest.raises(PassError, match=f"^{named}: a KL divergence of 2.0 exceeds"):
        check_bounds(found, AccuracySection(max_kl=1.0))


def test_an_artifact_that_cannot_be_measured_is_kept_unless_it_must_be(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CapacityError("no memory for it", where="test")

    monkeypatch.setattr(certificate, "gather_evidence", fail)
    found = certificate_of(build(INT8))
    assert found["measured"] is None and "no memory for it" in found["reason"]
    with pytest.raises(PassError, match=r"the accuracy cannot be measured: .*no memory for it"):
        build(INT8, "accuracy.max_kl=1")


def test_what_is_no_number_breaks_every_bound() -> None:
    stage = _stage([0.1, math.nan, math.nan], kl=math.nan)
    assert stage.origin() == "layer 1"
    found = Evidence("the whole model", 10, (stage,), None)
    with pytest.raises(PassError, match=r"some-pass: a KL divergence of nan .* begins in layer 1"):
        check_bounds(found, AccuracySection(max_kl=1e9))
    assert json.loads(json.dumps(stage.as_data(), allow_nan=False))["kl_mean"] == "nan"


def test_a_token_that_is_never_drawn_adds_nothing() -> None:
    logits = np.array([[0.0, 1.0, -np.inf], [2.0, 0.0, 1.0]])
    tally = Tally()
    tally.add(logits, logits, [1, 0])
    assert tally.divergence().kl_mean == 0
    assert tally.divergence().same_top == 1
    banned = logits.copy()
    banned[1, 0] = -np.inf
    for _ in range(2):
        tally.add(banned, logits, [1, 2])
    assert tally.divergence().kl_max == tally.divergence().kl_p99 == math.inf


def test_four_bits_are_bounded_unasked(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the recipe has a bound of its own."""
    monkeypatch.setattr(recipe_quantization, "DEFAULT_MAX_KL", 1e-6)
    monkeypatch.setattr(calibration, "AUTO_TOKENS", (1024,))
    with pytest.raises(PassError, match=r"KL divergence of .* exceeds 1e-06, which is accepted by"):
        build("quantization=int4")
    assert certificate_of(build("quantization=int4", "accuracy.max_kl=9"))["bounds"] == {
        "max_kl": 9
    }
