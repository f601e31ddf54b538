"""What `infc inspect` says of an artifact for a GPU, without one and without its driver."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from infc.driver.cli import run
from infc.driver.explain.collect import inspect_artifact, read_program
from infc.driver.explain.document import artifact_json
from infc.driver.explain.facts import Workload
from infc.driver.explain.predict import predict_steps
from infc.driver.explain.text import render_artifact
from infc.ir.artifact import open_artifact
from infc.ir.gpus import GPUS, LAUNCH_SECONDS
from infc.ir.launches import LAUNCHES_FILE, read_launches
from infc.ir.program import Program
from infc.ir.roofline import Ceilings
from infc.ir.targets import resolve_target

from .support import write_explained


@pytest.fixture(scope="module")
def artifact(captured: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model for an H200."""
    place = tmp_path_factory.mktemp("gpu") / "tiny"
    return write_explained(place, captured, target=resolve_target("sm_90"))


SAMPLING = ("always", "head", "draws", "sampled")


def test_launches_of_a_step(artifact: Path) -> None:
    """Counts are those of the plan, and layers of the bundled model are alike."""
    facts = inspect_artifact(artifact)
    assert facts.launches is not None and facts.predictions is not None
    plan = read_launches((artifact / LAUNCHES_FILE).read_text(), where="")
    for form, said in zip(plan.forms, facts.launches.forms, strict=True):
        sampling = [one for one in form.launches if one.when in SAMPLING]
        assert (said.name, said.launches) == (form.name, len(sampling))
        outside = len(sampling) - 6 * said.layer_launches
        assert said.layer_launches >= 5 and 0 <= outside < 22
    assert facts.launches.kernels == len(plan.kernels)
    assert facts.launches.image_bytes == 100 * len(plan.kernels)
    gaps = facts.launches.forms[0].launches * LAUNCH_SECONDS
    assert facts.launches.decode == pytest.approx(facts.predictions.decode + gaps)


def test_plans_for_a_gpu_of_the_target(artifact: Path) -> None:
    """Memory and ceilings are those of the GPU, whatever this machine has; memory can be given."""
    facts, gpu = inspect_artifact(artifact), GPUS["sm_90"]
    assert facts.memory.budget == gpu.memory_bytes == 141 * 10**9
    assert facts.predictions is not None and facts.predictions.ceilings == gpu.ceilings
    assert inspect_artifact(artifact, memory=1 << 30).memory.budget == 1 << 30


def test_attention_is_predicted_at_the_rate_that_its_cache_allows(artifact: Path) -> None:
    """Tensor cores multiply by numbers of 16 bits; a cache in float32 is not rounded to them."""
    program, workload = (
        read_program(open_artifact(artifact)),
        Workload(batch=1, context=64, tokens=64),
    )
    seconds = {}
    for threads in (0, 2):
        ceilings = Ceilings(threads=threads, read=1e30, fp32=1e9, bf16=1e12, int8=1e12)
        for dtype in ("f32", "bf16", "i8"):
            groups = tuple(replace(group, dtype=dtype) for group in program.resources)
            held = replace(program, resources=groups)
            ops = predict_steps(held, workload, ceilings, "").ops
            (attention,) = (op for op in ops if op.op == "paged_attention")
            seconds[threads, dtype] = attention.prefill
    slow = seconds.pop((0, "f32"))
    assert seconds.pop((0, "bf16")) == pytest.approx(slow / 1000)
    assert seconds.pop((0, "i8")) == pytest.approx(slow / 1000)
    assert set(seconds.values()) == {slow}


def test_text_and_json(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command shows the forms, what kernels use, and whose ceilings these are."""
    assert run(["inspect", str(artifact)]) == 0
    text = capsys.readouterr().out
    assert (
        "at the ceilings of NVIDIA's H200" in text and "thread" not in text.split("H200")[1][:150]
    )
    assert "launches of a step that samples" in text and "1.3 µs a launch" in text
    data = json.loads(artifact_json(inspect_artifact(artifact)))
    assert data["launches"]["forms"][0]["name"].startswith("decode")


def test_other_backends_have_none(tiny: Path) -> None:
    """Neither facts nor text."""
    facts = inspect_artifact(tiny)
    assert facts.launches is None and "launches" not in render_artifact(facts)
