"""Steps of TensorRT's executor over a recorded API, whose engines onnxruntime computes."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infc.ir.artifact import Artifact, open_artifact
from infc.ir.errors import ArtifactError, CapacityError, DeviceError, InfcError, ToolchainError
from infc.ir.extras import Extra
from infc.ir.resources import KvGroup
from infc.ir.tensorrt_engine import ALIGNMENT
from infc.runtime.executors import open_executor, tensorrt, tensorrt_engine
from infc.runtime.executors.base import ExecutorConfig, run_step
from infc.runtime.executors.gpu import cuda
from infc.runtime.executors.tensorrt_engine import slot_bytes
from infc.runtime.executors.tensorrt_feeds import Feeds, Part, part_feeds
from infc.runtime.scheduling.step import Step

from ..codegen.harness import Chunk, make_step
from ..emulation.test_models import RUN, tokens
from ..runtime.tensorrt.recorded import Machine, trt
from .builds import Build, Builds
from .neighbours import Answer, Events, play
from .support import BLOCK_SIZE, forced_rows, parity_prompts, relative_error

HALF = Build("llama", dtype="float16", changes=(("num_hidden_layers", 2),))
MODELS = [
    pytest.param(HALF, id="all keys"),
    pytest.param(Build("gemma2", dtype="float16"), id="windows and a soft-cap"),
    pytest.param(
        Build("gpt_oss", dtype="float16", changes=(("num_hidden_layers", 2),)),
        id="sinks and experts",
        marks=pytest.mark.breadth,
    ),
    pytest.param(Build("mixtral", dtype="float16"), id="experts", marks=pytest.mark.breadth),
]
BOUND = 1e-2
"""Of the largest logit of a row: attention and results of products are rounded to float16 here."""
VISIBLE = 5 * BOUND


def engine(build: Build) -> Build:
    """The same model for TensorRT, with few profiles, and slots of no round size."""
    sets = {
        "target": "sm_89",
        "tensorrt.weights": "inputs",
        "tensorrt.decode_buckets": [4],
        "runtime.max_sequences": 8,
        "runtime.step_tokens": 255,
    }
    return replace(build, backend="tensorrt", sets=(*build.sets, *sets.items()))


@contextmanager
def running(artifact: Artifact, **facts: Any) -> Iterator[Machine]:
    """A machine with a GPU, on which executors open the artifact."""
    machine = Machine(artifact, **facts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "CudaDriver", lambda: machine.driver)
        patch.setattr(tensorrt_engine, "import_library", lambda: ("tensorrt_rtx", machine))
        patch.setattr("infc.ir.nvidia.free_gpu_bytes", lambda: 1 << 28)
        yield machine


def parity_error(artifact: Artifact, model: Build, builds: Builds) -> tuple[float, list[str]]:
    """How far logits and hidden states are from those of the reference, and the driver's calls."""
    sequences = parity_prompts(model.arch)
    with running(artifact) as machine:
        found = forced_rows(artifact, sequences)
    expected = forced_rows(builds.artifact(replace(model, backend="reference")), sequences)
    errors = (max(map(relative_error, *pair)) for pair in zip(found, expected, strict=True))
    return max(errors), machine.calls


@pytest.mark.parametrize("model", MODELS)
def test_steps_give_what_the_reference_gives(model: Build, builds: Builds) -> None:
    """Chunks of uneven sizes, of sequences whose slots are in no order."""
    error, calls = parity_error(builds.artifact(engine(model)), model, builds)
    assert error < BOUND
    assert {"enqueue 0", "enqueue 2"} <= set(calls), "a part that decodes, and parts with chunks"


def test_any_slot_may_be_the_first_that_is_bound(builds: Builds) -> None:
    """Where it begins, an array may begin, though slots are of no round size."""
    (group,) = builds.artifact(engine(HALF)).manifest.main.resources
    assert isinstance(group, KvGroup)
    assert [slot_bytes(group, part) % ALIGNMENT for part in ("key", "value")] == [0, 0]


def late_write(patch: pytest.MonkeyPatch) -> None:
    """Keys and values go one place too far."""

    def shifted(*args: Any) -> Feeds:
        found = part_feeds(*args)
        for name, array in found.arrays.items():
            if name.startswith("write_at"):
                array += 1
        return found

    patch.setattr(tensorrt, "part_feeds", shifted)


def stale_lengths(patch: pytest.MonkeyPatch) -> None:
    """Rows whose sequence is elsewhere write over what is stored."""

    def zeroed(step: Step, part: Part, profile: Any, groups: Any, lengths: Any) -> Feeds:
        return part_feeds(step, part, profile, groups, [np.zeros_like(one) for one in lengths])

    patch.setattr(tensorrt, "part_feeds", zeroed)


def test_a_late_write_shows(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    late_write(monkeypatch)
    assert parity_error(builds.artifact(engine(HALF)), HALF, builds)[0] > VISIBLE


def answers(artifact: Artifact, counts: Counter[str]) -> list[Answer]:
    """What each job gets from an engine with too few blocks; what happened is counted."""
    events = Events(counts)
    with pytest.MonkeyPatch.context() as patch:
        events.watch(patch)
        found = dict(play(artifact, RUN, events))
    return [found[job] for job in RUN.jobs]


def share_alike(artifact: Artifact, builds: Builds, counts: Counter[str]) -> float:
    """The share of jobs of which each token is that of the reference."""
    found = answers(artifact, counts)
    expected = answers(builds.artifact(replace(HALF, backend="reference")), Counter())
    pairs = zip(tokens(found), tokens(expected), strict=True)
    return float(np.mean([one == other for one, other in pairs]))


def test_requests_are_answered_with_graphs_and_copies(
    builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the real engine: choices share what was computed, decode steps are replayed."""
    counts = Counter[str]()
    artifact = builds.artifact(engine(HALF))
    with running(artifact) as machine:
        alike = share_alike(artifact, builds, counts)
    asked = Counter(call.split()[0] for call in machine.driver.calls)
    assert counts["copies on write"] and asked["replay"] > asked["captured"] > 0
    assert machine.driver.is_closed
    stale_lengths(monkeypatch)
    with running(artifact):
        faulty = share_alike(artifact, builds, Counter())
    assert alike > 0.7 and faulty < alike - 0.2, "float16 may turn a draw, and no more than that"


CONFIG = ExecutorConfig(num_blocks=(5,))


def copied(builds: Builds, target: Path) -> Artifact:
    """An engine that a test may damage."""
    shutil.copytree(builds.artifact(engine(HALF)).path, target)
    return open_artifact(target, "none")


def change(artifact: Artifact, **changes: Any) -> None:
    """Say something else of the engine."""
    path = artifact.path / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_engine_of_another_version_says_which_to_install(builds: Builds, tmp_path: Path) -> None:
    """Without a GPU: what reads engines is compared before one is looked for."""
    artifact = copied(builds, tmp_path / "art")
    change(artifact, version="1.5.0.114")
    message = r"built by tensorrt_rtx 1\.5\.0\.114, and here is .*'tensorrt-rtx==1\.5\.0\.114'"
    with pytest.raises(ArtifactError, match=message):
        open_executor(artifact, CONFIG)
    change(artifact, library="tensorrt")
    with pytest.raises(ArtifactError, match=r"built by tensorrt 1\.5\.0\.114, and here is"):
        open_executor(artifact, CONFIG)


def test_a_truncated_engine_is_found_without_a_gpu(builds: Builds, tmp_path: Path) -> None:
    artifact = copied(builds, tmp_path / "art")
    whole = artifact.entry_path.stat().st_size
    os.truncate(artifact.entry_path, whole - 64)
    message = rf"has {whole - 64} bytes instead of {whole}.*compile it again"
    with pytest.raises(ArtifactError, match=message):
        open_executor(artifact, CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv": "pages"}, "in the form 'pages'"),
        ({"library": "other"}, "the library 'other'"),
        ({"profiles": []}, "has no profiles"),
        ({"profiles": [{"decode": 1}]}, "a profile with other keys"),
        ({"chips": "sm_89 sm_80"}, "chips that are no texts"),
        ({"weights": [1]}, "weights that are no texts"),
        ({"num_bytes": "many"}, "no size or no facts"),
        ({"num_bytes": 0}, "no size or no facts"),
        ({"more": 1}, "the keys of an engine"),
    ],
)
def test_a_description_that_is_none_is_refused(
    changes: dict[str, Any], message: str, builds: Builds, tmp_path: Path
) -> None:
    artifact = copied(builds, tmp_path / "art")
    change(artifact, **changes)
    with pytest.raises(ArtifactError, match=rf"engine\.json: .*{message}"):
        open_executor(artifact, CONFIG)


def test_a_missing_package_is_named_with_its_extra(
    builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Extra, "missing", lambda extra: ["tensorrt_rtx"])
    with pytest.raises(ToolchainError, match=r"needs tensorrt_rtx, .*infc\[tensorrt\]"):
        open_executor(builds.artifact(engine(HALF)), CONFIG)


def test_another_chip_is_named(builds: Builds) -> None:
    artifact = builds.artifact(engine(HALF))
    with running(artifact) as machine:
        machine.driver.with_device(capability=(9, 0))
        message = r"built for sm_89, this GPU is sm_90 \(Test GPU\).*tensorrt\.chips"
        with pytest.raises(ArtifactError, match=message):
            open_executor(artifact, CONFIG)
    assert machine.driver.is_closed


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"validity": trt.EngineValidity.INVALID}, "cannot read the engine: it is not valid here"),
        ({"reads": False}, "cannot read the engine"),
    ],
)
def test_an_engine_that_tensorrt_does_not_take_is_named(
    facts: dict[str, Any], message: str, builds: Builds
) -> None:
    artifact = builds.artifact(engine(HALF))
    with (
        running(artifact, **facts),
        pytest.raises(ArtifactError, match=rf"{message}.*compile the model again"),
    ):
        open_executor(artifact, CONFIG)


@pytest.mark.parametrize("free_bytes", [0, 1 << 16], ids=["values of a step", "weights"])
def test_an_engine_that_does_not_fit_is_given_back_before_the_driver(
    free_bytes: int, builds: Builds
) -> None:
    with running(builds.artifact(engine(HALF))) as machine:
        machine.driver.with_device(free_bytes=free_bytes)
        with pytest.raises(CapacityError):
            open_executor(machine.artifact, CONFIG)
    assert machine.driver.is_closed and machine.deleted_late == [False]


def test_facts_of_another_model_are_refused(builds: Builds, tmp_path: Path) -> None:
    artifact = copied(builds, tmp_path / "art")
    facts = json.loads(artifact.read_text("engine.json"))["facts"]
    change(artifact, facts={**facts, "vocab_size": 1})
    with running(artifact), pytest.raises(ArtifactError, match="does not match the manifest"):
        open_executor(artifact, CONFIG)


def test_after_a_failed_step_nothing_runs(builds: Builds) -> None:
    artifact = builds.artifact(engine(HALF))
    step = make_step([Chunk([1, 2, 3], 0, [1])], num_groups=1, block_size=BLOCK_SIZE)
    with running(artifact, fails_after=1):
        executor = open_executor(artifact, CONFIG)
        run_step(executor, step)
        with pytest.raises(DeviceError, match="TensorRT failed in a step"):
            run_step(executor, step)
        with pytest.raises(DeviceError, match="failed in an earlier step"):
            run_step(executor, step)
        executor.close()
        executor.close()
        with pytest.raises(InfcError, match="the engine is closed"):
            run_step(executor, step)
