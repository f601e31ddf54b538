"""Nodes where another artifact lies at the path: whoever opens it refuses it. No cluster runs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infc.driver.ray.deployments import FrontReplica, Wanted
from infc.driver.ray.engine import EngineReplica
from infc.driver.ray.job import RayJob
from infc.driver.ray.same_artifact import open_same
from infc.driver.ray.worker import Worker
from infc.ir.artifact import open_artifact
from infc.ir.errors import ArtifactError
from infc.runtime.server.settings import ServerSettings

from ...runtime.small_artifact import write_small_artifact

OTHER = "0" * 64


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without kernels."""
    return write_small_artifact(tmp_path_factory.mktemp("ray") / "small.infc")


def job(path: Path, **changed: Any) -> RayJob:
    """One that began with another artifact."""
    how: dict[str, Any] = {
        "artifact": str(path),
        "identity": OTHER,
        "model_name": "small",
        "id_column": "id",
        "columns": {"prompt": "prompt"},
        "body": {},
        "seed": 0,
        "most_workers": 1,
        "num_cpus": 1,
    }
    return RayJob(**{**how, **changed})


def front(path: Path) -> None:
    """Begins one, which asks engines only after that."""
    wanted = Wanted(
        path=str(path),
        identity=OTHER,
        vocab_size=1,
        options={},
        settings=ServerSettings(model_names=("small",)),
        routing="prefix",
        max_ongoing=1,
        num_replicas=1,
        autoscaling=None,
        actor_options={},
        num_fronts=1,
        front_cpus=1,
    )
    deployment: Any = FrontReplica
    kind = deployment.func_or_class.__mro__[1]  # below what Ray adds
    asyncio.run(kind.__init__(object.__new__(kind), None, wanted))


def test_everybody_refuses_another_artifact(artifact: Path) -> None:
    assert open_same(str(artifact), open_artifact(artifact).identity).path == artifact
    for begin in (
        lambda: front(artifact),
        lambda: EngineReplica(str(artifact), OTHER, {}, 60.0),
        lambda: Worker(job(artifact)),
    ):
        with pytest.raises(ArtifactError, match="this node has another artifact here"):
            begin()


def test_a_job_is_the_same_wherever_its_artifact_lies(artifact: Path) -> None:
    """Answers have no name of a model, and follow from the identity."""
    one = job(artifact)
    moved = replace(one, artifact="/elsewhere/model.infc", model_name="model")
    assert moved.digest == one.digest
    assert replace(one, identity="1" * 64).digest != one.digest
