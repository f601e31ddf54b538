"""Engines that TensorRT-RTX builds here, without a GPU; none of them is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infc.driver.rebuild import rebuild_artifact
from infc.ir.errors import InfcError, UsageError
from infc.ir.extras import TENSORRT, TENSORRT_COMPILE, Extra
from infc.ir.safetensors import read_header
from infc.runtime.executors.tensorrt_engine import read_engine

from .engines import engine, facts_of

trt = pytest.importorskip(
    "tensorrt_rtx", reason="builds engines: pip install 'infc[tensorrt-compile]'"
)


def test_one_engine_for_several_chips_holds_the_weights(tmp_path: Path) -> None:
    sets: dict[str, Any] = {"tensorrt.chips": ["sm_80", "SM_120"]}
    artifact = engine(tmp_path, **sets)
    facts = facts_of(artifact)
    assert facts.chips == ("sm_89", "sm_80", "sm_120")
    assert (facts.library, facts.version) == ("tensorrt_rtx", trt.__version__)
    assert [(one.decode, one.rows, one.queries) for one in facts.profiles] == [
        (True, 4, 1),
        (False, 4, 32),
    ]
    assert artifact.entry_path.stat().st_size == facts.num_bytes
    assert read_header(artifact.weights_path)[0] == {} and facts.weights == ()
    assert artifact.manifest.target.name == "sm_89"
    recipe = json.loads((artifact.path / "manifest.json").read_text())["recipe"]
    assert recipe["tensorrt"]["chips"] == ["sm_80", "SM_120"]
    image = read_engine(artifact, artifact.manifest.main)
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    validity, _ = runtime.get_engine_validity(image.content)
    assert isinstance(validity, trt.EngineValidity), "it takes a file that is mapped"

    with pytest.raises(UsageError, match=r"engine contains its weights.*--set target=sm_86"):
        rebuild_artifact(artifact.path, "sm_86", tmp_path / "other.infc")


CODES = "quantization.scheme"
NO_TABLE = {"quantization.embedding": "none"}


@pytest.mark.parametrize(
    ("arch", "sets"),
    [
        pytest.param("gemma2", {"dtype": "float16"}, id="float16, a soft-cap and windows"),
        pytest.param("llama", {CODES: "q4_0-weights", **NO_TABLE}, id="4 bits"),
        pytest.param("llama", {CODES: "fp8", **NO_TABLE}, id="e4m3"),
    ],
)
def test_weights_may_be_inputs_that_lie_in_the_file(
    arch: str, sets: dict[str, Any], tmp_path: Path
) -> None:
    artifact = engine(tmp_path, arch, layers=1 if arch == "llama" else 2,
                      **{"tensorrt.weights": "inputs", **sets})  # fmt: skip
    facts = facts_of(artifact)
    assert set(facts.weights) <= set(read_header(artifact.weights_path)[0])
    assert facts.weights and facts.weights == artifact.manifest.main.weights.tensors
    if CODES not in sets:
        return
    other = rebuild_artifact(artifact.path, "sm_120", tmp_path / "other.infc")
    assert facts_of(other).chips == ("sm_120",)
    assert other.weights_path.read_bytes() == artifact.weights_path.read_bytes()


REFUSED = [
    pytest.param({"target": "sm_90"}, r"sm_90: TensorRT-RTX does not build.*triton", id="sm_90"),
    pytest.param({"target": "sm_75"}, r"sm_75: TensorRT-RTX has no attention", id="sm_75"),
    pytest.param(
        {"target": "x86-64-v3"},
        r"does not compile for x86-64-v3 .*sm_80, sm_86, sm_89, sm_120\)$",
        id="a processor",
    ),
    pytest.param(
        {"tensorrt.chips": ["sm_12"]}, r"'sm_12' in tensorrt.chips .*sm_80, sm_86", id="no chip"
    ),
    pytest.param({"dtype": "float32"}, r"matrices in float32 \(choose bfloat16", id="float32"),
    pytest.param({"kv_cache.dtype": "float32"}, r"KV cache in float32", id="a cache of float32"),
    pytest.param(
        {CODES: "fp8", "target": "sm_80", **NO_TABLE},
        r"sm_80 has no products of e4m3: choose q4_0-weights, or build for sm_89 or sm_120",
        id="e4m3 on sm_80",
    ),
    pytest.param({CODES: "int4"}, r"in b4_g32.*choose another scheme, such as q4_0", id="levels"),
    pytest.param(
        {CODES: "q4_0", **NO_TABLE}, r"choose the scheme with -weights", id="rows of int8"
    ),
    pytest.param(
        {CODES: "fp8", "quantization.embedding": "fp8"}, r"embedding: none", id="a table of codes"
    ),
    pytest.param(
        {"arch": "mixtral", CODES: "fp8", **NO_TABLE},
        r"only matrices of products are codes: .*skip: \['\*experts",
        id="experts of codes",
    ),
    pytest.param(
        {"tensorrt.decode_buckets": [9]},
        r"tensorrt.decode_buckets: 9 is no number of sequences in a step: expected 1 to 4",
        id="a bucket beyond the limits",
    ),
]


@pytest.mark.parametrize(("sets", "message"), REFUSED)
def test_what_is_not_built_is_refused_with_a_way_out(
    sets: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InfcError, match=message):
        engine(tmp_path, layers=1, **sets)


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(extra: Extra) -> list[str]:
        return ["tensorrt_rtx"] if extra in (TENSORRT, TENSORRT_COMPILE) else []

    monkeypatch.setattr(Extra, "missing", missing)
    with pytest.raises(
        InfcError, match=r"needs tensorrt_rtx, .*pip install 'infc\[tensorrt-compile\]'"
    ):
        engine(tmp_path, layers=1)
