"""Models in e4m3: what compiles, what the report says of it, and what is refused at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import infc
from infc.codegen.registry import get_backend
from infc.driver.cli import run
from infc.ir.artifact import Artifact
from infc.ir.errors import ProgramError, UsageError
from infc.ir.resources import KvGroup
from infc.ir.schemes import SCHEMES
from infc.ir.targets import resolve_target
from infc.ir.text import parse_program

NAMES = [name for name, scheme in SCHEMES.items() if scheme.is_fp8]


def compiled(
    recipe: Path | str, output: Path, sets: Sequence[str] = (), **quantization: Any
) -> tuple[Artifact, dict[str, Any]]:
    given = (f"quantization.{key}={json.dumps(value)}" for key, value in quantization.items())
    sets = [*sets, *given]
    artifact = infc.compile(recipe, output, overrides=sets, cache=False)
    return artifact, json.loads((artifact.path / "report.json").read_text())


@pytest.mark.parametrize("scheme", NAMES)
def test_the_bundled_model_compiles_and_runs(scheme: str, tmp_path: Path) -> None:
    artifact, report = compiled(
        "tiny", tmp_path / "out", ["backend=reference"], scheme=scheme, method="nearest"
    )
    certificate = report["certificate"]
    assert 0 < certificate["passes"][0]["kl_mean"] < 0.01
    program = (artifact.path / "program.ir").read_text()
    assert f'scheme = "{scheme}"' in program and "scaled_embedding" in program
    assert ('codes = "e4m3"' in program) == (SCHEMES[scheme].activations is not None)
    held = {(one["class"], one["format"]) for one in certificate["formats"]}
    assert {("embeddings and head", scheme), ("layers", scheme)} <= held
    with infc.LLM(artifact) as llm:
        (answer,) = llm.generate(["a b c"], infc.SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(answer.outputs[0].token_ids) == 3


def test_rows_are_calibrated_and_others_say_why_not(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text of no great depth, again and again. " * 20)
    calibration = {"text": str(tmp_path / "text.txt"), "tokens": 128}
    found = {}
    for scheme, method in (("fp8", "gptq"), ("fp8-block", "auto")):
        _, report = compiled(
            source / "model.yaml",
            tmp_path / scheme,
            scheme=scheme,
            method=method,
            calibration=calibration,
        )
        found[scheme] = next(p for p in report["passes"] if p["name"] == "calibrate-weights")
    errors = found["fp8"]["details"]["errors"]
    assert errors and all(one["gptq"] <= one["nearest"] for one in errors)
    assert sum(one["gptq"] for one in errors) < sum(one["nearest"] for one in errors)
    assert found["fp8-block"]["matches"] == 0
    reasons = {miss["reason"] for miss in found["fp8-block"]["near_misses"]}
    reason = "rounded to nearest: error feedback has no grid for the scheme fp8-block"
    assert reason in reasons
    with pytest.raises(UsageError, match=f"method gptq has nothing to calibrate: {reason}"):
        compiled(
            source / "model.yaml",
            tmp_path / "out",
            scheme="fp8-block",
            method="gptq",
            calibration=calibration,
        )


@pytest.mark.parametrize("scheme", NAMES)
def test_cpp_refuses_it_before_any_work(scheme: str, source: Path, tmp_path: Path) -> None:
    form = SCHEMES[scheme].weight
    assert not get_backend("cpp").can_hold(form) and get_backend("reference").can_hold(form)
    with pytest.raises(UsageError, match=f"no kernels for matrices in {form.name}") as error:
        infc.compile(
            source / "model.yaml",
            tmp_path / "out",
            overrides=["backend=cpp", "target=native", f"quantization={scheme}"],
        )
    assert scheme in error.value.message
    others = "--set backend=reference or --set backend=triton --set target=sm_90"
    assert others in str(error.value.hint)
    assert not (tmp_path / "out").exists()


def test_a_cache_in_e4m3_is_declared_measured_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["backend=reference", "dtype=float32", "kv_cache.dtype=fp8"]
    artifact, report = compiled("tiny", tmp_path / "out", sets)
    (group,) = artifact.manifest.main.resources
    assert isinstance(group, KvGroup)
    assert group.dtype == "e4m3" and group.has_scales
    assert group.bytes_per_block() == replace(group, dtype="i8").bytes_per_block()
    program = parse_program((artifact.path / "program.ir").read_text(), source="program.ir")
    with pytest.raises(ProgramError, match=r"'cpp' has no kernels for the kv group 'full' in e4m3"):
        get_backend("cpp").check(program, resolve_target("x86-64-v3"))
    # Nothing else of it is lossy.
    assert not report["certificate"]["passes"]
    assert 1e-4 < report["certificate"]["figures"]["kl_mean"] < 0.01
    capsys.readouterr()
    assert run(["inspect", str(artifact.path)]) == 0
    assert "in e4m3" in capsys.readouterr().out
    with infc.LLM(artifact) as llm:
        (answer,) = llm.generate(["a b c"], infc.SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(answer.outputs[0].token_ids) == 3


def test_cpp_refuses_such_a_cache_before_any_work(source: Path, tmp_path: Path) -> None:
    sets = ["backend=cpp", "target=native", "kv_cache.dtype=fp8"]
    with pytest.raises(UsageError, match="cpp has no kernels for a KV cache in fp8") as error:
        infc.compile(source / "model.yaml", tmp_path / "a", overrides=sets)
    hint = str(error.value.hint)
    assert "choose int8" in hint and "backend=reference or --set backend=triton" in hint
    assert not (tmp_path / "a").exists()
